// moai: kernels scan_backward, scan_reduce; macros T=bf16 TB=bf16 N=16 WARPS=1 PIPED=0 TILE=16 | T=float TB=float N=64 WARPS=4 PIPED=0 TILE=8
//
// Gradients of the selective scan (scan_forward.cu), with its division of work: a lane owns a channel, a warp a share of
// the states, a block 32 channels. Tiles are walked from the last to the first. In a tile the states are computed again
// from the one before it (`kept`), into registers; then time runs backwards,
//
//   g_t = C_t dy_t + exp(dt_(t+1) A) g_(t+1);   dy = d_out silu(z)
//   dC_t += h_t dy_t,  dB_t += g_t dt_t u_t       sums over channels
//   d(dt u)_t = g_t . B_t,  d(dt)_t += q . A,  dA += q dt_t   with q = exp(dt_t A) g_t h_(t-1)
//
// Sums over states stay in the thread. Sums over the 32 channels of a warp are products with a matrix of ones and zeros
// on the tensor cores: the first puts the sums over 4 lanes of value v into row v, the second adds a row up. tf32 drops
// bits; for fp32 inputs each number goes in two parts, so that 22 bits count. Sums over a row's blocks are written as
// partial sums and added in a fixed order by scan_reduce: no atomics, the same bits every time.
#include "scan.cuh"

constexpr bool EXACT = sizeof(T) == 4;
constexpr int FRAGMENTS = 2 * TILE / 16;  // of 16 sums each: TILE of dB, then TILE of dC

struct Slot {  // one tile as it comes from memory
  T u[TILE][32], dt[TILE][32], z[TILE][32], g[TILE][32];
  TB BC[TILE][BC_ROW];
  Kept kept[N][32];
  int mark[TILE];
};

struct Pool {
  Slot slot[SLOTS];
  float dt[BUFFERS][32][TILE + 4], x[BUFFERS][32][TILE + 4], dy[BUFFERS][32][TILE + 4];
  float BC[BUFFERS][2 * N][TILE];
  float sums[BUFFERS][WARPS][3][32][TILE + 4];  // over a warp's states: g B, q A log2(e), C h
  float dBC[BUFFERS][TILE][2 * N + 4];          // over the block's channels
  float a2[N][32], carry[N][32], dA[N][32];     // each used by one thread; here because registers can't be indexed
};
static_assert(sizeof(Pool) <= SHARED, "SHARED is what the caller reserves");

// Sums over the lanes of 16 values a lane: add() pairs, then sum(); lane 4g + t has sums 2g and 2g + 1, for every t.
struct LaneSums {
  float rows[4] = {0, 0, 0, 0};
  float two[2];

  DEVICE void add(const uint32 (&one)[8], int pair, float first, float second) {
    const uint32 a[4] = {one[pair], 0, 0, one[pair]};
    const uint32 b[2] = {float_bits(first), float_bits(second)};
    if (EXACT) {
      const uint32 high[2] = {b[0] & 0xffffe000u, b[1] & 0xffffe000u};
      const uint32 low[2] = {float_bits(first - bits_float(high[0])), float_bits(second - bits_float(high[1]))};
      mma_tf32(rows, a, high);
      mma_tf32(rows, a, low);
    } else {
      mma_tf32(rows, a, b);
    }
  }

  DEVICE void sum() {
    const uint32 ones[2] = {0x3f800000u, 0x3f800000u};
    const uint32 a[4] = {float_bits(rows[0]), float_bits(rows[2]), float_bits(rows[1]), float_bits(rows[3])};
    float d[4] = {0, 0, 0, 0};
    if (EXACT) {
      uint32 high[4], low[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        high[k] = a[k] & 0xffffe000u;
        low[k] = float_bits(bits_float(a[k]) - bits_float(high[k]));
      }
      mma_tf32(d, high, ones);
      mma_tf32(d, low, ones);
    } else {
      mma_tf32(d, a, ones);
    }
    two[0] = d[0];
    two[1] = d[2];
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    scan_backward(const T* u, const T* dt, const float* A, const TB* B, const TB* C, const float* D, const T* z,
                  const float* bias, const int* seq_idx, const Kept* kept, const T* g, const float* d_last, T* d_u,
                  T* d_dt, T* d_z, float* d_A, float* d_BC, float* d_D, float* d_bias, float* d_first, int64 L, int64 I,
                  int64 u_batch, int64 u_step, int64 dt_batch, int64 dt_step, int64 z_batch, int64 z_step,
                  int64 B_batch, int64 B_step, int64 C_batch, int64 C_step, int64 g_batch, int64 g_step) {
  extern __shared__ __align__(16) unsigned char shared[];
  Pool& pool = *reinterpret_cast<Pool*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int blocks = (int)((I + 31) / 32), block = blockIdx.x % blocks;  // of a row's channels
  const int64 batch = blockIdx.x / blocks, c0 = (int64)block * 32, c = c0 + lane;
  const bool mine = c < I;
  const int tiles = (int)((L + TILE - 1) / TILE);
  const int64 end = (int64)(tiles - 1) * TILE;  // the first step of the last tile
  constexpr int STATES = N / WARPS, STEPS = TILE / WARPS;

  for (int j = 0; j < STATES; ++j) {
    const int n = warp * STATES + j;
    pool.a2[n][lane] = mine ? decay_rate(A[c * N + n]) : -1.0f;
    pool.carry[n][lane] = mine && d_last ? d_last[(batch * I + c) * N + n] : 0.0f;
    pool.dA[n][lane] = 0.0f;
  }
  uint32 one[8];  // 1.0 in the lanes of group p, for the matrices that sum
#pragma unroll
  for (int p = 0; p < 8; ++p) one[p] = lane / 4 == p ? 0x3f800000u : 0u;
  const float bias_c = mine && bias ? bias[c] : 0.0f, D_c = mine && D ? D[c] : 0.0f;
  float sum_D = 0.0f, sum_bias = 0.0f;

  Cursor<T, 32> u_rows(u + batch * u_batch + end * u_step + c0, u_step, -TILE * u_step, 0, I - c0);
  Cursor<T, 32> dt_rows(dt + batch * dt_batch + end * dt_step + c0, dt_step, -TILE * dt_step, 2, I - c0);
  Cursor<T, 32> z_rows(z ? z + batch * z_batch + end * z_step + c0 : nullptr, z_step, -TILE * z_step, 4, I - c0);
  Cursor<T, 32> g_rows(g + batch * g_batch + end * g_step + c0, g_step, -TILE * g_step, 6, I - c0);
  Cursor<TB, N> B_rows(B + batch * B_batch + end * B_step, B_step, -TILE * B_step, 1, N);
  Cursor<TB, N> C_rows(C + batch * C_batch + end * C_step, C_step, -TILE * C_step, 3, N);
  Cursor<Kept, 32, N> kept_rows(kept + (batch * tiles + tiles - 1) * N * I + c0, I, -N * I, 5, I - c0);
  Marker marker(seq_idx ? seq_idx + batch * L : nullptr, (int)L);
  d_u += batch * L * I + c;
  d_dt += batch * L * I + c;
  if (d_z) d_z += batch * L * I + c;
  d_BC += (block * (int64)(gridDim.x / blocks) + batch) * L * 2 * N;

  auto load = [&](int i) {
    if (i < tiles) {
      Slot& s = pool.slot[i % SLOTS];
      const int t0 = (tiles - 1 - i) * TILE, left = (int)L - t0;
      u_rows.copy(s.u[0], 32, left);
      dt_rows.copy(s.dt[0], 32, left);
      z_rows.copy(s.z[0], 32, left);
      g_rows.copy(s.g[0], 32, left);
      B_rows.copy(s.BC[0], BC_ROW, left);
      C_rows.copy(s.BC[0] + N, BC_ROW, left);
      kept_rows.copy(s.kept[0], 32, N);
      marker.fetch(t0);
    }
    copy_async_commit();
  };
  auto arrive = [&](int i) {
    if (i < tiles) marker.store(pool.slot[i % SLOTS].mark);
  };

  auto stage_in = [&](int i) {
    const Slot& s = pool.slot[i % SLOTS];
    const int to = i % BUFFERS;
    float dts[STEPS], xs[STEPS], dys[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const int t = warp * STEPS + k, mark = s.mark[t];
      const float step = softplus(to_float(s.dt[t][lane]) + bias_c);
      const float x = step * to_float(s.u[t][lane]);
      float dy = to_float(s.g[t][lane]);
      if (z) {
        const float gate = to_float(s.z[t][lane]);
        dy *= gate * sigmoid(gate);
      }
      dts[k] = mark == PAD ? 0.0f : mark == RESET ? FORGET : step;
      xs[k] = mark == PAD ? 0.0f : x;
      dys[k] = mark == PAD ? 0.0f : dy;
    }
    write_row<STEPS>(&pool.dt[to][lane][warp * STEPS], dts);
    write_row<STEPS>(&pool.x[to][lane][warp * STEPS], xs);
    write_row<STEPS>(&pool.dy[to][lane][warp * STEPS], dys);
    widen_states(pool.BC[to], s.BC, s.mark);
  };

  auto body = [&](int i) {
    const Slot& s = pool.slot[i % SLOTS];
    const int from = i % BUFFERS;
    float dts[TILE], xs[TILE], dys[TILE], gB[TILE], qA[TILE], Ch[TILE];
    read_row<TILE>(dts, pool.dt[from][lane]);
    read_row<TILE>(xs, pool.x[from][lane]);
    read_row<TILE>(dys, pool.dy[from][lane]);
#pragma unroll
    for (int t = 0; t < TILE; ++t) gB[t] = qA[t] = Ch[t] = 0.0f;
#pragma unroll 1
    for (int n = warp * STATES; n < (warp + 1) * STATES; ++n) {
      const float a2 = pool.a2[n][lane];
      float Bs[TILE], Cs[TILE], a[TILE], h[TILE + 1];
      read_row<TILE>(Bs, pool.BC[from][n]);
      read_row<TILE>(Cs, pool.BC[from][N + n]);
      h[0] = to_float(s.kept[n][lane]);
#pragma unroll
      for (int t = 0; t < TILE; ++t) {
        a[t] = exp2_approx(dts[t] * a2);
        h[t + 1] = a[t] * h[t] + xs[t] * Bs[t];
        Ch[t] += Cs[t] * h[t + 1];
      }
      float carry = pool.carry[n][lane], dA = 0.0f, dB[2], dC[2];
      LaneSums sums[FRAGMENTS];
#pragma unroll
      for (int t = TILE - 1; t >= 0; --t) {
        const float back = Cs[t] * dys[t] + carry;
        dC[t % 2] = h[t + 1] * dys[t];
        dB[t % 2] = back * xs[t];
        gB[t] += back * Bs[t];
        carry = a[t] * back;
        const float q = carry * h[t];
        qA[t] += q * a2;
        dA += q * dts[t];
        if (t % 2 == 0) {
          sums[t / 16].add(one, t % 16 / 2, dB[0], dB[1]);
          sums[(TILE + t) / 16].add(one, (TILE + t) % 16 / 2, dC[0], dC[1]);
        }
      }
      pool.carry[n][lane] = carry;
      pool.dA[n][lane] += dA;
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) {
        sums[f].sum();
        const int v = f * 16 + lane / 4 * 2;
        if (lane % 4 == f) {
          pool.dBC[from][v % TILE][v / TILE * N + n] = sums[f].two[0];
          pool.dBC[from][v % TILE + 1][v / TILE * N + n] = sums[f].two[1];
        }
      }
    }
    write_row<TILE>(pool.sums[from][warp][0][lane], gB);
    write_row<TILE>(pool.sums[from][warp][1][lane], qA);
    write_row<TILE>(pool.sums[from][warp][2][lane], Ch);
  };

  auto stage_out = [&](int i) {
    const Slot& s = pool.slot[i % SLOTS];
    const int from = i % BUFFERS, t0 = (tiles - 1 - i) * TILE;
    float total[3][STEPS];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
#pragma unroll
      for (int j = 0; j < STEPS; ++j) total[k][j] = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        float part[STEPS];
        read_row<STEPS>(part, &pool.sums[from][w][k][lane][warp * STEPS]);
#pragma unroll
        for (int j = 0; j < STEPS; ++j) total[k][j] += part[j];
      }
    }
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const int t = warp * STEPS + k;
      const bool pad = s.mark[t] == PAD;
      const float raw = to_float(s.dt[t][lane]) + bias_c, u_t = to_float(s.u[t][lane]);
      const float g_t = to_float(s.g[t][lane]);
      float dy = g_t, to_z = 0.0f;
      if (z) {
        const float gate = to_float(s.z[t][lane]), open = sigmoid(gate);
        dy *= gate * open;
        to_z = g_t * (total[2][k] + D_c * u_t) * open * (1.0f + gate * (1.0f - open));
      }
      const float to_u = softplus(raw) * total[0][k] + D_c * dy;
      const float to_dt = (u_t * total[0][k] + LN2 * total[1][k]) * sigmoid(raw);
      if (mine && t0 + t < L) {
        const int64 at = (int64)(t0 + t) * I;
        d_u[at] = from_float<T>(pad ? 0.0f : to_u);
        d_dt[at] = from_float<T>(pad ? 0.0f : to_dt);
        if (d_z) d_z[at] = from_float<T>(pad ? 0.0f : to_z);
      }
      sum_D += pad ? 0.0f : dy * u_t;
      sum_bias += pad ? 0.0f : to_dt;
    }
#pragma unroll
    for (int k = threadIdx.x; k < TILE * 2 * N / 4; k += THREADS) {
      const int t = k / (2 * N / 4), n = k % (2 * N / 4) * 4;
      if (t0 + t < L)
        store_vec<float, 4>(d_BC + (int64)(t0 + t) * 2 * N + n, load_vec<float, 4>(&pool.dBC[from][t][n]));
    }
  };

  run_tiles(tiles, load, arrive, stage_in, body, stage_out);

  for (int j = 0; j < STATES; ++j) {
    const int n = warp * STATES + j;
    if (mine) {
      d_A[(batch * I + c) * N + n] = pool.dA[n][lane];
      if (d_first) d_first[(batch * I + c) * N + n] = pool.carry[n][lane];
    }
  }
  float(*edge)[2][32] = reinterpret_cast<float(*)[2][32]>(pool.sums);
  block_barrier();
  edge[warp][0][lane] = sum_D;
  edge[warp][1][lane] = sum_bias;
  block_barrier();
  if (warp == 0 && mine) {
    for (int w = 1; w < WARPS; ++w) {
      sum_D += edge[w][0][lane];
      sum_bias += edge[w][1][lane];
    }
    if (d_D) d_D[batch * I + c] = sum_D;
    if (d_bias) d_bias[batch * I + c] = sum_bias;
  }
}

// dB and dC from the partial sums (blocks, rows, 2 N), rows = batch * L: four numbers a thread, blocks in order.
extern "C" __global__ void scan_reduce(const float* parts, TB* d_B, TB* d_C, int64 blocks, int64 rows) {
  const int64 at = ((int64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (at >= rows * 2 * N) return;
  Vec<float, 4> sum = load_vec<float, 4>(parts + at);
  for (int64 k = 1; k < blocks; ++k) {
    const Vec<float, 4> part = load_vec<float, 4>(parts + k * rows * 2 * N + at);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.at[j] += part.at[j];
  }
  const int64 row = at / (2 * N), n = at % (2 * N);
  TB* to = n < N ? d_B + row * N + n : d_C + row * N + n - N;
#pragma unroll
  for (int j = 0; j < 4; ++j) to[j] = from_float<TB>(sum.at[j]);
}
