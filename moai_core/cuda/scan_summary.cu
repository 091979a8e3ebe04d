// moai: kernels scan_summary; macros T=bf16 TB=bf16 N=16 WARPS=2 GATED=1 REVERSE=0 TILE=16 SHARED=49152 | T=float TB=float N=64 WARPS=4 GATED=0 REVERSE=1 TILE=16 SHARED=98304
//
// What a segment of time does to the state that enters it (scan_forward.cu, scan_backward.cu): its sum of dt, of which
// exp(A sum) is the decay over the whole segment, and where it takes a zero state. REVERSE: the same for the gradient that
// enters at its end, g = exp(dt_t A) (g + C_t dy_t). One pass with the recurrence's exponentials and nothing else.
#include "scan.cuh"

struct alignas(16) Slot {  // one tile as it comes from memory
  T dt[TILE][32], in[TILE][32], z[TILE][32];
  TB states[TILE][narrow_row<N>];
  int mark[TILE], special;
};

struct alignas(16) Pool {
  Slot slot[SLOTS];
  Rows dt, in;
  float states[N][TILE];
};
static_assert(sizeof(Pool) <= SHARED, "SHARED is what the caller reserves");

// `in` is u, or the gradient of y; `states` B, or C. ends (rows, segments, I, N), sums (rows, segments, I).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    scan_summary(const T* in, const T* dt, const float* A, const TB* states, const T* z, const float* bias,
                 const int* seq_idx, float* ends, float* sums, int64 L, int64 I, int64 segments, int64 span,
                 int64 in_batch, int64 in_step, int64 dt_batch, int64 dt_step, int64 z_batch, int64 z_step,
                 int64 states_batch, int64 states_step) {
  extern __shared__ __align__(16) unsigned char shared[];
  Pool& pool = *reinterpret_cast<Pool*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Segment at(L, I, segments, span);
  if (at.index == (REVERSE ? 0 : at.count - 1)) return;  // nothing lies beyond it
  const int64 batch = at.batch, c0 = at.c0, c = c0 + lane;
  const bool mine = c < I;
  const int64 t_first = (int64)(at.first + (REVERSE ? at.tiles - 1 : 0)) * TILE;
  constexpr int way = REVERSE ? -TILE : TILE;
  constexpr bool gated = GATED && REVERSE;
  const Edge edge;
  const int at_c = column(edge.t0, edge.c);

  float a2[STATES], h[STATES], total = 0.0f, bias_c[2];
#pragma unroll
  for (int j = 0; j < STATES; ++j) {
    a2[j] = mine ? decay_rate(A[c * N + warp * STATES + j]) : -1.0f;
    h[j] = 0.0f;
  }
  read_channels(bias_c, bias, c0 + edge.c, I);

  Cursor<T, 32, true> in_rows(in + batch * in_batch + t_first * in_step + c0, in_step, way * in_step, 0, I - c0);
  Cursor<T, 32, true> dt_rows(dt + batch * dt_batch + t_first * dt_step + c0, dt_step, way * dt_step, 2, I - c0);
  Cursor<T, 32, true> z_rows(gated ? z + batch * z_batch + t_first * z_step + c0 : nullptr, z_step, way * z_step, 4, I - c0);
  Cursor<TB, N> states_rows(states + batch * states_batch + t_first * states_step, states_step, way * states_step, 6, N);
  Marker marker(seq_idx ? seq_idx + batch * L : nullptr, (int)L);

  auto load = [&](int i) {
    Slot& s = pool.slot[i % SLOTS];
    const int t0 = (int)t_first + i * way, left = (int)L - t0;
    in_rows.copy_in(s.in[0], 32, left);
    dt_rows.copy_in(s.dt[0], 32, left);
    if (gated) z_rows.copy_in(s.z[0], 32, left);
    states_rows.copy_in(s.states[0], narrow_row<N>, left);
    marker.fetch(t0);
  };
  auto arrive = [&](int i) { marker.store(pool.slot[i % SLOTS].mark, pool.slot[i % SLOTS].special); };

  auto stage_in = [&](int i) {
    const Slot& s = pool.slot[i % SLOTS];
    float dts[2][PER], ins[2][PER];
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int t = edge.t0 + k;
      float raw[2], x[2], gate[2];
      read_pair(raw, &s.dt[t][at_c]);
      read_pair(x, &s.in[t][at_c]);
      if (gated) read_pair(gate, &s.z[t][at_c]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        dts[j][k] = softplus(raw[j] + bias_c[j]);
        ins[j][k] = REVERSE ? (gated ? x[j] * (gate[j] * sigmoid(gate[j])) : x[j]) : dts[j][k] * x[j];
      }
    }
    if (s.special) {
      mark_times(dts, s.mark, edge);
      mark_values(ins, s.mark, edge);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      write_steps(pool.dt, edge.c + j, edge.t0, dts[j]);
      write_steps(pool.in, edge.c + j, edge.t0, ins[j]);
    }
    widen_states(pool.states, s.states, s.mark, s.special);
  };

  auto body = [&](int i) {
#pragma unroll 1
    for (int k = 0; k < TILE; k += 8) {
      const int t0 = REVERSE ? TILE - 8 - k : k;
      float dts[8], ins[8];
      read_steps(dts, pool.dt, lane, t0);
      read_steps(ins, pool.in, lane, t0);
#pragma unroll
      for (int t = 0; t < 8; ++t) total += dts[t];
#pragma unroll
      for (int j = 0; j < STATES; ++j) {
        float weights[8];
        read_broadcast(weights, &pool.states[warp * STATES + j][t0]);
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          const int t = REVERSE ? 7 - m : m;
          const float a = exp2_approx(dts[t] * a2[j]), x = ins[t] * weights[t];
          h[j] = REVERSE ? a * (h[j] + x) : a * h[j] + x;
        }
      }
    }
  };

  run_tiles(at.tiles, load, arrive, stage_in, body, [](int) {}, [](int) {});

  if (mine) {
#pragma unroll
    for (int j = 0; j < STATES; ++j) ends[(at.row() * I + c) * N + warp * STATES + j] = h[j];
    if (warp == 0) sums[at.row() * I + c] = total;
  }
}
