// moai: kernels scan_summary; macros T=bf16 TB=bf16 N=16 WARPS=1 TEAMS=1 GATED=1 REVERSE=0 TILE=32 SHARED=49152 | T=float TB=float N=64 WARPS=1 TEAMS=1 GATED=0 REVERSE=1 TILE=16 SHARED=98304
//
// What a segment of time does to the state that enters it (scan_forward.cu, scan_backward.cu): its sum of dt, of which
// exp(A sum) is the decay over the whole segment, and where it takes a zero state. With S_t the sum of dt behind step t,
//
//   end = sum over t of exp(A S_t) dt_t u_t B_t
//
// walked from the last step to the first. REVERSE: the same for the gradient that enters at its end, walked from the
// first step to the last: sum over t of exp(A S_t) C_t dy_t, S_t the sum of dt up to step t. One pass with the
// recurrence's exponentials and nothing else, and no chain from step to step.
//
// What is further away than a state's memory isn't looked at: a state whose weight in all of 32 channels has fallen below
// 2^-REACH, fp32's resolution times that of the results, takes no more steps, and a warp ends with its last state.
//
// A warp, which is a block, owns 32 channels and GROUP states; a lane its channel with all that is done once a step. TILE
// is twice that of the other kernels. No warp waits for another, so that those with fast states leave early.
#include "scan.cuh"

constexpr float REACH = sizeof(T) == 4 ? 48.0f : 36.0f;
constexpr int DEPTH = 2;  // tiles at work or on their way
constexpr bool gated = GATED && REVERSE;
static_assert(WARPS == 1 && TEAMS == 1, "a block is a warp");

struct alignas(16) Slot {  // one tile as it comes from memory
  T dt[TILE][32], in[TILE][32], z[gated ? TILE : 1][32];
  TB states[TILE][GROUP];
  int mark[TILE + 1], special;
};

struct alignas(16) Pool {
  Slot slot[DEPTH];
  float states[GROUP][TILE];
};
static_assert(sizeof(Pool) <= SHARED, "SHARED is what the caller reserves");

// `in` is u, or the gradient of y; `states` B, or C. ends (rows, segments, N, I), sums (rows, segments, GROUPS, I).
extern "C" __global__ void __launch_bounds__(32)
    scan_summary(const T* in, const T* dt, const float* A, const TB* states, const T* z, const float* bias,
                 const int* seq_idx, float* ends, float* sums, int64 L, int64 I, int64 segments, int64 span,
                 int64 in_batch, int64 in_step, int64 dt_batch, int64 dt_step, int64 z_batch, int64 z_step,
                 int64 states_batch, int64 states_step) {
  extern __shared__ __align__(16) unsigned char shared[];
  Pool& pool = *reinterpret_cast<Pool*>(shared);
  const int lane = threadIdx.x;
  const int each = gridDim.x / GROUPS, group = blockIdx.x / each;
  const Segment at(L, I, segments, span, blockIdx.x % each, each);
  if (at.index == (REVERSE ? 0 : at.count - 1)) return;  // nothing lies beyond it
  const int64 batch = at.batch, c0 = at.c0, c = c0 + lane;
  const bool mine = c < I;

  float a2[GROUP], end[GROUP], age = 0.0f;
  uint32 alive = (1u << GROUP) - 1;  // a bit a state
#pragma unroll
  for (int j = 0; j < GROUP; ++j) {
    a2[j] = mine ? decay_rate(A[c * N + group * GROUP + j]) : -1.0f;
    end[j] = 0.0f;
  }
  const float bias_c = mine && bias ? bias[c] : 0.0f;

  const int begin = (at.first + (REVERSE ? 0 : at.tiles - 1)) * TILE, way = REVERSE ? TILE : -TILE;
  Cursor<T, 32> in_rows(in + batch * in_batch + c0, in_step, 0, I - c0, begin, way);
  Cursor<T, 32> dt_rows(dt + batch * dt_batch + c0, dt_step, 0, I - c0, begin, way);
  Cursor<T, 32> z_rows(z + batch * z_batch + c0, z_step, 0, I - c0, begin, way);
  Cursor<TB, GROUP> states_rows(states + batch * states_batch + group * GROUP, states_step, 0, GROUP, begin, way);
  const Marker marker{seq_idx ? seq_idx + batch * L : nullptr, (int)L};

  auto load = [&](int i) {
    if (i < at.tiles) {
      Slot& s = pool.slot[i % DEPTH];
      const int t0 = begin + i * way, left = (int)L - t0;
      in_rows.copy_in(s.in[0], 32, left);
      dt_rows.copy_in(s.dt[0], 32, left);
      if (gated) z_rows.copy_in(s.z[0], 32, left);
      states_rows.copy_in(s.states[0], GROUP, left);
      marker.fetch(s.mark, t0);
    }
    copy_async_commit();
  };

  // B or C in fp32, a row of steps a state; zeros at padding.
  auto widen = [&](const Slot& s) {
#pragma unroll
    for (int k = 0; k < GROUP * TILE / 2; k += 32) {
      const int t = (k + lane) % TILE, n = (k + lane) / TILE * 2;
      float both[2];
      read_pair(both, &s.states[t][n]);
      const bool pad = s.special && s.mark[t] == PAD;
      pool.states[n][t] = pad ? 0.0f : both[0];
      pool.states[n + 1][t] = pad ? 0.0f : both[1];
    }
  };

  // Eight steps from t0 on: everything that doesn't depend on the state.
  auto prepare = [&](const Slot& s, int t0, float(&ins)[8], float(&ages)[8]) {
    float dts[8];
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const float x = to_float(s.in[t0 + t][lane]), gate = gated ? to_float(s.z[t0 + t][lane]) : 0.0f;
      dts[t] = softplus(to_float(s.dt[t0 + t][lane]) + bias_c);
      ins[t] = REVERSE ? (gated ? x * (gate * sigmoid(gate)) : x) : dts[t] * x;
    }
    if (s.special) {
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const int mark = s.mark[t0 + t];
        ins[t] = mark == PAD ? 0.0f : ins[t];
        dts[t] = mark == PAD ? 0.0f : mark == RESET ? FORGET : dts[t];
      }
    }
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const int t = REVERSE ? m : 7 - m;
      ages[t] = REVERSE ? age + dts[t] : age;
      age += dts[t];
    }
  };

#pragma unroll 1
  for (int i = 0; i < DEPTH; ++i) load(i);
#pragma unroll 1
  for (int i = 0; i < at.tiles; ++i) {
    Slot& s = pool.slot[i % DEPTH];
    copy_async_wait<DEPTH - 1>();
    marker.store(s.mark, s.special, begin + i * way);
    __syncthreads();
    widen(s);
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < TILE; k += 8) {
      const int t0 = REVERSE ? k : TILE - 8 - k;
      float ins[8], ages[8];
      prepare(s, t0, ins, ages);
#pragma unroll
      for (int j0 = 0; j0 < GROUP; j0 += 4) {  // four states at once keep a warp alone busy
        if (alive >> j0 & 15) {
          float weights[4][8];
#pragma unroll
          for (int j = 0; j < 4; ++j) read_broadcast(weights[j], &pool.states[j0 + j][t0]);
#pragma unroll
          for (int t = 0; t < 8; ++t) {
#pragma unroll
            for (int j = 0; j < 4; ++j) end[j0 + j] += exp2_approx(ages[t] * a2[j0 + j]) * (ins[t] * weights[j][t]);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < GROUP; ++j)
      if (!__any_sync(0xffffffffu, mine && age * a2[j] > -REACH)) alive &= ~(1u << j);
    if (!__syncthreads_or(alive != 0)) break;
    load(i + DEPTH);
  }
  copy_async_wait<0>();

  if (mine) {
#pragma unroll
    for (int j = 0; j < GROUP; ++j) ends[(at.row() * N + group * GROUP + j) * I + c] = end[j];
    sums[(at.row() * GROUPS + group) * I + c] = age;
  }
}
