// moai: kernels scan_forward; macros T=bf16 TB=bf16 N=16 WARPS=1 PIPED=0 TILE=16 | T=float TB=float N=64 WARPS=4 PIPED=0 TILE=16
//
// The selective scan of Mamba-1, forward: h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t;  y_t = (C_t . h_t + D u_t) silu(z_t),
// dt = softplus(raw dt + bias). Source: arXiv 2312.00752, algorithm 2; what is new is the order of the work.
//
// A lane owns one channel, a warp 32 channels and N / WARPS of their states, a block the 32 channels with all N states.
// States live in registers and time runs inside the thread, so the recurrence costs its five instructions a state and
// step: two products, an exponential, two multiply-adds. Work that is per (step, channel) and not per state (softplus,
// gate, conversions) is done once, at the edge of a tile of TILE steps, by all warps together; B and C are turned to fp32
// there too and broadcast from shared memory. WARPS > 1 gives small batches enough threads without cutting time.
//
//   stage_in(i)   raw tile i (arrived by asynchronous copies) -> dt, dt u, B, C in fp32
//   body(i)       the recurrence; each warp leaves its share of C . h
//   stage_out(i)  sum of the shares, D u, gate, store
//
// PIPED runs the three on tiles i, i - 1, i - 2 between two barriers; otherwise they follow one another.
// Memory of the backward pass: `kept`, the state before every tile, (batch, tiles, N, I), 16 bits for 16-bit inputs.
#include "scan.cuh"

struct Slot {  // one tile as it comes from memory
  T u[TILE][32], dt[TILE][32], z[TILE][32];
  TB BC[TILE][BC_ROW];
  int mark[TILE];
};

struct Pool {
  Slot slot[SLOTS];
  float dt[BUFFERS][32][TILE + 4], x[BUFFERS][32][TILE + 4];  // rows padded: 16-byte accesses of 8 lanes hit all banks
  float BC[BUFFERS][2 * N][TILE];
  float y[BUFFERS][WARPS][32][TILE + 4];
};
static_assert(sizeof(Pool) <= SHARED, "SHARED is what the caller reserves");

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    scan_forward(const T* u, const T* dt, const float* A, const TB* B, const TB* C, const float* D, const T* z,
                 const float* bias, const float* first, const int* seq_idx, T* y, float* last, Kept* kept, int64 L,
                 int64 I, int64 u_batch, int64 u_step, int64 dt_batch, int64 dt_step, int64 z_batch, int64 z_step,
                 int64 B_batch, int64 B_step, int64 C_batch, int64 C_step) {
  extern __shared__ __align__(16) unsigned char shared[];
  Pool& pool = *reinterpret_cast<Pool*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int blocks = (int)((I + 31) / 32), block = blockIdx.x % blocks;  // of a row's channels
  const int64 batch = blockIdx.x / blocks, c0 = (int64)block * 32, c = c0 + lane;
  const bool mine = c < I;
  const int tiles = (int)((L + TILE - 1) / TILE);
  constexpr int STATES = N / WARPS;    // of one thread
  constexpr int STEPS = TILE / WARPS;  // of one thread, at the edges

  if (seq_idx) seq_idx += batch * L;
  y += batch * L * I + c;
  if (kept) kept += batch * tiles * N * I + c;

  float a2[STATES], h[STATES];
#pragma unroll
  for (int j = 0; j < STATES; ++j) {
    const int64 at = (batch * I + c) * N + warp * STATES + j;
    a2[j] = mine ? decay_rate(A[c * N + warp * STATES + j]) : -1.0f;
    h[j] = mine && first ? first[at] : 0.0f;
  }
  const float bias_c = mine && bias ? bias[c] : 0.0f, D_c = mine && D ? D[c] : 0.0f;
  Cursor<T, 32> u_rows(u + batch * u_batch + c0, u_step, TILE * u_step, 0, I - c0);
  Cursor<T, 32> dt_rows(dt + batch * dt_batch + c0, dt_step, TILE * dt_step, 2, I - c0);
  Cursor<T, 32> z_rows(z ? z + batch * z_batch + c0 : nullptr, z_step, TILE * z_step, 4, I - c0);
  Cursor<TB, N> B_rows(B + batch * B_batch, B_step, TILE * B_step, 6, N);
  Cursor<TB, N> C_rows(C + batch * C_batch, C_step, TILE * C_step, 7, N);
  Marker marker(seq_idx, (int)L);

  auto load = [&](int i) {
    if (i < tiles) {
      Slot& s = pool.slot[i % SLOTS];
      const int left = (int)L - i * TILE;
      u_rows.copy(s.u[0], 32, left);
      dt_rows.copy(s.dt[0], 32, left);
      z_rows.copy(s.z[0], 32, left);
      B_rows.copy(s.BC[0], BC_ROW, left);
      C_rows.copy(s.BC[0] + N, BC_ROW, left);
      marker.fetch(i * TILE);
    }
    copy_async_commit();
  };
  auto arrive = [&](int i) {
    if (i < tiles) marker.store(pool.slot[i % SLOTS].mark);
  };

  auto stage_in = [&](int i) {
    const Slot& s = pool.slot[i % SLOTS];
    const int to = i % BUFFERS;
    float dts[STEPS], xs[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const int t = warp * STEPS + k, mark = s.mark[t];
      const float step = softplus(to_float(s.dt[t][lane]) + bias_c);
      const float x = step * to_float(s.u[t][lane]);
      dts[k] = mark == PAD ? 0.0f : mark == RESET ? FORGET : step;
      xs[k] = mark == PAD ? 0.0f : x;
    }
    write_row<STEPS>(&pool.dt[to][lane][warp * STEPS], dts);
    write_row<STEPS>(&pool.x[to][lane][warp * STEPS], xs);
    widen_states(pool.BC[to], s.BC, s.mark);
  };

  auto body = [&](int i) {
    const int from = i % BUFFERS;
    if (kept && mine) {
#pragma unroll
      for (int j = 0; j < STATES; ++j)
        kept[((int64)i * N + warp * STATES + j) * I] = from_float<Kept>(h[j]);
    }
#pragma unroll 1
    for (int t0 = 0; t0 < TILE; t0 += 8) {
      float dts[8], xs[8], ys[8];
      read_row<8>(dts, &pool.dt[from][lane][t0]);
      read_row<8>(xs, &pool.x[from][lane][t0]);
#pragma unroll
      for (int t = 0; t < 8; ++t) ys[t] = 0.0f;
#pragma unroll
      for (int j = 0; j < STATES; ++j) {
        float Bs[8], Cs[8];
        read_row<8>(Bs, &pool.BC[from][warp * STATES + j][t0]);
        read_row<8>(Cs, &pool.BC[from][N + warp * STATES + j][t0]);
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          h[j] = exp2_approx(dts[t] * a2[j]) * h[j] + xs[t] * Bs[t];
          ys[t] += Cs[t] * h[j];
        }
      }
      write_row<8>(&pool.y[from][warp][lane][t0], ys);
    }
  };

  auto stage_out = [&](int i) {
    const Slot& s = pool.slot[i % SLOTS];
    const int from = i % BUFFERS;
    float sum[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; ++k) sum[k] = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float part[STEPS];
      read_row<STEPS>(part, &pool.y[from][w][lane][warp * STEPS]);
#pragma unroll
      for (int k = 0; k < STEPS; ++k) sum[k] += part[k];
    }
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const int t = warp * STEPS + k;
      float out = sum[k] + D_c * to_float(s.u[t][lane]);
      if (z) {
        const float gate = to_float(s.z[t][lane]);
        out *= gate * sigmoid(gate);
      }
      if (s.mark[t] == PAD) out = 0.0f;
      if (mine && i * TILE + t < L) y[(int64)(i * TILE + t) * I] = from_float<T>(out);
    }
  };

  run_tiles(tiles, load, arrive, stage_in, body, stage_out);

  if (mine) {
#pragma unroll
    for (int j = 0; j < STATES; ++j) last[(batch * I + c) * N + warp * STATES + j] = h[j];
  }
}
