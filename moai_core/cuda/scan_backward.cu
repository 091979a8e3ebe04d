// moai: kernels scan_backward, scan_reduce; macros T=bf16 TB=bf16 N=16 WARPS=2 GATED=1 TILE=16 SHARED=65536 | T=float TB=float N=64 WARPS=2 GATED=1 TILE=8 SHARED=98304
//
// Gradients of the selective scan (scan_forward.cu), with its division of work: a lane owns a channel, a warp a share of
// the states, a block 32 channels. Tiles are walked from the last to the first. In a tile the states are computed again
// from the one before it (`kept`), into registers; then time runs backwards,
//
//   g_t = C_t dy_t + exp(dt_(t+1) A) g_(t+1);   dy = d_out silu(z)
//   dC_t += h_t dy_t,  dB_t += g_t dt_t u_t       sums over channels
//   d(dt u)_t = g_t . B_t,  d(dt)_t += q . A,  dA += q dt_t   with q = exp(dt_t A) g_t h_(t-1)
//
// Sums over a thread's states stay in its registers. Sums over the 32 channels of a warp begin on the tensor cores: values
// times a matrix of ones and zeros leave, for each group of 4 lanes, the sum of each value; 7 exchanges between lanes add
// the groups and deal the 32 sums out. tf32 drops bits; for fp32 inputs each number goes in two parts, so that 22 bits count. Sums over a
// row's blocks are written as partial sums and added in a fixed order by scan_reduce: no atomics, the same bits every time.
#include "scan.cuh"

constexpr bool EXACT = sizeof(T) == 4;
constexpr int VALUES = 2 * TILE;            // summed over channels, of one state: dB of each step, then dC
constexpr int FRAGMENTS = VALUES / 16;      // of the tensor cores' results
constexpr bool RATES = N <= 32;             // decay rates in shared memory, where it has room
constexpr int PART = 2 * N * TILE;          // numbers of a tile's partial sums

struct alignas(16) Slot {  // one tile as it comes from memory
  T u[TILE][32], dt[TILE][32], z[TILE][32], g[TILE][32];
  TB BC[TILE][narrow_row<2 * N>];
  Kept kept[N][32];
  int mark[TILE], special;
};

struct alignas(16) Pool {
  Slot slot[SLOTS];
  Rows dt, x, dy;
  float BC[2 * N][TILE];  // when a state is done, the sums over channels that are its dB and dC
  Rows Ch[WARPS], gB[WARPS], qA[WARPS];  // over a warp's states: C h, g B, q A log2(e)
  float carry[N][32], dA[N][32];  // each one thread's; here because registers can't be indexed
  float a2[RATES ? N : 1][32];
};
static_assert(sizeof(Pool) <= SHARED, "SHARED is what the caller reserves");

// Adds to `sums` the sums over groups of 4 lanes of the values 4 j ... 4 j + 3. `one[p]` is 1.0 in the lanes of group p.
// Lane 4 g + t ends with group g's sums of the values 4 t ... 4 t + 3.
DEVICE void add_lanes(float (&sums)[4], const uint32 (&one)[8], int j, const float (&v)[4]) {
  const uint32 to[2] = {one[2 * j], one[2 * j + 1]};
  const uint32 a[4] = {float_bits(v[0]), float_bits(v[2]), float_bits(v[1]), float_bits(v[3])};
  if (EXACT) {
    uint32 high[4], low[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      high[k] = a[k] & 0xffffe000u;
      low[k] = float_bits(bits_float(a[k]) - bits_float(high[k]));
    }
    mma_tf32(sums, high, to);
    mma_tf32(sums, low, to);
  } else {
    mma_tf32(sums, a, to);
  }
}

// Adds the 8 groups' sums. Each exchange halves what a lane has left, so that in the end each has one of the 32 values (of
// the 16, two lanes the same).
DEVICE void add_groups(float (&to)[2 * N][TILE], int n, const float (&sums)[FRAGMENTS][4], int lane) {
  const bool high16 = lane & 16, high8 = lane & 8, high4 = lane & 4;
  auto exchange = [](bool high, float low_value, float high_value, int other) {
    return (high ? high_value : low_value) + __shfl_xor_sync(0xffffffffu, high ? low_value : high_value, other);
  };
  float left[FRAGMENTS];
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) {
    const float one = exchange(high16, sums[f][0], sums[f][2], 16), two = exchange(high16, sums[f][1], sums[f][3], 16);
    left[f] = exchange(high8, one, two, 8);
  }
  const int value = (FRAGMENTS == 2 && high4 ? 16 : 0) + lane % 4 * 4 + (high16 ? 2 : 0) + (high8 ? 1 : 0);
  to[value / TILE * N + n][value % TILE] = exchange(high4, left[0], left[FRAGMENTS - 1], 4);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    scan_backward(const T* u, const T* dt, const float* A, const TB* B, const TB* C, const float* D, const T* z,
                  const float* bias, const int* seq_idx, const Kept* kept, const T* g, const float* d_last,
                  const float* ends, const float* sums, T* d_u, T* d_dt, T* d_z, float* d_A, Kept* parts, float* d_D,
                  float* d_bias, float* d_first, int64 L, int64 I, int64 segments, int64 span,
                  int64 u_batch, int64 u_step, int64 dt_batch, int64 dt_step, int64 z_batch, int64 z_step,
                  int64 B_batch, int64 B_step, int64 C_batch, int64 C_step, int64 g_batch, int64 g_step,
                  int64 d_z_batch, int64 d_z_step) {
  extern __shared__ __align__(16) unsigned char shared[];
  Pool& pool = *reinterpret_cast<Pool*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Segment at(L, I, segments, span);
  const int64 batch = at.batch, c0 = at.c0, c = c0 + lane;
  const bool mine = c < I;
  const int all = (int)((L + TILE - 1) / TILE), last = at.first + at.tiles - 1;  // tiles of the row, the segment's last
  const int64 end = (int64)last * TILE;
  const Edge edge;
  const int at_c = column(edge.t0, edge.c);

#pragma unroll 1
  for (int n = warp * STATES; n < (warp + 1) * STATES; ++n) {
    const float a2 = mine ? decay_rate(A[c * N + n]) : -1.0f;
    float carry = mine && d_last ? d_last[(batch * I + c) * N + n] : 0.0f;
#pragma unroll 1
    for (int64 s = (batch + 1) * at.count - 1; mine && s > at.row(); --s)  // through the segments after this one
      carry = exp2_approx(a2 * sums[s * I + c]) * carry + ends[(s * I + c) * N + n];
    if (RATES) pool.a2[n][lane] = a2;
    pool.carry[n][lane] = carry;
    pool.dA[n][lane] = 0.0f;
  }
  uint32 one[8];
#pragma unroll
  for (int p = 0; p < 8; ++p) one[p] = lane / 4 == p ? 0x3f800000u : 0u;
  float bias_c[2], D_c[2], sum_D[2] = {0.0f, 0.0f}, sum_bias[2] = {0.0f, 0.0f};
  read_channels(bias_c, bias, c0 + edge.c, I);
  read_channels(D_c, D, c0 + edge.c, I);

  // Tiles are walked from the last to the first: rows begin at the last tile, tiles lie backwards.
  Cursor<T, 32, true> u_rows(u + batch * u_batch + end * u_step + c0, u_step, -TILE * u_step, 0, I - c0);
  Cursor<T, 32, true> dt_rows(dt + batch * dt_batch + end * dt_step + c0, dt_step, -TILE * dt_step, 2, I - c0);
  Cursor<T, 32, true> z_rows(GATED ? z + batch * z_batch + end * z_step + c0 : nullptr, z_step, -TILE * z_step, 4, I - c0);
  Cursor<T, 32, true> g_rows(g + batch * g_batch + end * g_step + c0, g_step, -TILE * g_step, 6, I - c0);
  Cursor<TB, N> B_rows(B + batch * B_batch + end * B_step, B_step, -TILE * B_step, 1, N);
  Cursor<TB, N> C_rows(C + batch * C_batch + end * C_step, C_step, -TILE * C_step, 3, N);
  Cursor<Kept, 32, false, N> kept_rows(kept + (batch * all + last) * N * I + c0, I, -N * I, 5, I - c0);
  Cursor<T, 32, true> d_u_rows(d_u + (batch * L + end) * I + c0, I, -TILE * I, 0, I - c0);
  Cursor<T, 32, true> d_dt_rows(d_dt + (batch * L + end) * I + c0, I, -TILE * I, 2, I - c0);
  Cursor<T, 32, true> d_z_rows(GATED ? d_z + batch * d_z_batch + end * d_z_step + c0 : nullptr, d_z_step, -TILE * d_z_step, 4,
                         I - c0);
  Marker marker(seq_idx ? seq_idx + batch * L : nullptr, (int)L);
  const int64 batches = gridDim.x / at.blocks / at.count;
  parts += ((at.block * batches + batch) * all + last) * (int64)PART;

  auto load = [&](int i) {
    Slot& s = pool.slot[i % SLOTS];
    const int t0 = (last - i) * TILE, left = (int)L - t0;
    u_rows.copy_in(s.u[0], 32, left);
    dt_rows.copy_in(s.dt[0], 32, left);
    if (GATED) z_rows.copy_in(s.z[0], 32, left);
    g_rows.copy_in(s.g[0], 32, left);
    B_rows.copy_in(s.BC[0], narrow_row<2 * N>, left);
    C_rows.copy_in(s.BC[0] + N, narrow_row<2 * N>, left);
    kept_rows.copy_in(s.kept[0], 32, N);
    marker.fetch(t0);
  };
  auto arrive = [&](int i) { marker.store(pool.slot[i % SLOTS].mark, pool.slot[i % SLOTS].special); };

  auto stage_in = [&](int i) {
    const Slot& s = pool.slot[i % SLOTS];
    float dts[2][PER], xs[2][PER], dys[2][PER];
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int t = edge.t0 + k;
      float raw[2], us[2], gs[2], gate[2];
      read_pair(raw, &s.dt[t][at_c]);
      read_pair(us, &s.u[t][at_c]);
      read_pair(gs, &s.g[t][at_c]);
      if (GATED) read_pair(gate, &s.z[t][at_c]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        dts[j][k] = softplus(raw[j] + bias_c[j]);
        xs[j][k] = dts[j][k] * us[j];
        dys[j][k] = GATED ? gs[j] * (gate[j] * sigmoid(gate[j])) : gs[j];
      }
    }
    if (s.special) {
      mark_times(dts, s.mark, edge);
      mark_values(xs, s.mark, edge);
      mark_values(dys, s.mark, edge);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      write_steps(pool.dt, edge.c + j, edge.t0, dts[j]);
      write_steps(pool.x, edge.c + j, edge.t0, xs[j]);
      write_steps(pool.dy, edge.c + j, edge.t0, dys[j]);
    }
    widen_states(pool.BC, s.BC, s.mark, s.special);
  };

  auto body = [&](int i) {
    const Slot& s = pool.slot[i % SLOTS];
    float dts[TILE], xs[TILE], dys[TILE], gB[TILE], qA[TILE], Ch[TILE];
    read_steps(dts, pool.dt, lane, 0);
    read_steps(xs, pool.x, lane, 0);
    read_steps(dys, pool.dy, lane, 0);
#pragma unroll
    for (int t = 0; t < TILE; ++t) gB[t] = qA[t] = Ch[t] = 0.0f;
#pragma unroll 1
    for (int n = warp * STATES; n < (warp + 1) * STATES; ++n) {
      const float a2 = RATES ? pool.a2[n][lane] : mine ? decay_rate(A[c * N + n]) : -1.0f;
      float Bs[TILE], Cs[TILE], a[TILE], h[TILE + 1];
      read_broadcast(Bs, pool.BC[n]);
      read_broadcast(Cs, pool.BC[N + n]);
      h[0] = to_float(s.kept[n][lane]);
#pragma unroll
      for (int t = 0; t < TILE; ++t) {
        a[t] = exp2_approx(dts[t] * a2);
        h[t + 1] = a[t] * h[t] + xs[t] * Bs[t];
        Ch[t] += Cs[t] * h[t + 1];
      }
      float carry = pool.carry[n][lane], dA = 0.0f, dB[4], dC[4], sums[FRAGMENTS][4] = {};
#pragma unroll
      for (int t = TILE - 1; t >= 0; --t) {
        const float back = Cs[t] * dys[t] + carry;
        dC[t % 4] = h[t + 1] * dys[t];
        dB[t % 4] = back * xs[t];
        gB[t] += back * Bs[t];
        carry = a[t] * back;
        const float q = carry * h[t];
        qA[t] += q * a2;
        dA += q * dts[t];
        if (t % 4 == 0) {
          add_lanes(sums[t / 16], one, t % 16 / 4, dB);
          add_lanes(sums[(TILE + t) / 16], one, (TILE + t) % 16 / 4, dC);
        }
      }
      pool.carry[n][lane] = carry;
      pool.dA[n][lane] += dA;
      __syncwarp();  // B and C of this state have been read
      add_groups(pool.BC, n, sums, lane);
    }
    write_steps(pool.gB[warp], lane, 0, gB);
    write_steps(pool.qA[warp], lane, 0, qA);
    write_steps(pool.Ch[warp], lane, 0, Ch);
  };

  auto gradients = [&](Slot& s, const float(&gB)[2][PER], const float(&qA)[2][PER], const float(&Ch)[2][PER],
                       bool special) {
    float dts[2][PER];
    read_steps(dts[0], pool.dt, edge.c, edge.t0);
    read_steps(dts[1], pool.dt, edge.c + 1, edge.t0);
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int t = edge.t0 + k;
      float raw[2], us[2], gs[2], gate[2], to_u[2], to_dt[2], to_z[2];
      read_pair(raw, &s.dt[t][at_c]);
      read_pair(us, &s.u[t][at_c]);
      read_pair(gs, &s.g[t][at_c]);
      if (GATED) read_pair(gate, &s.z[t][at_c]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float dy = gs[j];
        if (GATED) {
          const float open = sigmoid(gate[j]), gated = gate[j] * open;  // silu, whose slope is open + gated (1 - open)
          to_z[j] = gs[j] * (Ch[j][k] + D_c[j] * us[j]) * (open + gated * (1.0f - open));
          dy *= gated;
        }
        const float before = raw[j] + bias_c[j];
        const float step = special && s.mark[t] == RESET ? softplus(before) : dts[j][k];
        to_u[j] = step * gB[j][k] + D_c[j] * dy;
        to_dt[j] = (us[j] * gB[j][k] + LN2 * qA[j][k]) * sigmoid(before);
        float to_D = dy * us[j];
        if (special && s.mark[t] == PAD) to_u[j] = to_dt[j] = to_z[j] = to_D = 0.0f;
        sum_D[j] += to_D;
        sum_bias[j] += to_dt[j];
      }
      write_pair(&s.u[t][at_c], to_u);
      write_pair(&s.dt[t][at_c], to_dt);
      if (GATED) write_pair(&s.z[t][at_c], to_z);
    }
  };

  auto stage_out = [&](int i) {
    Slot& s = pool.slot[i % SLOTS];
    float gB[2][PER], qA[2][PER], Ch[2][PER];
    add_shares(gB, pool.gB, edge);
    add_shares(qA, pool.qA, edge);
    add_shares(Ch, pool.Ch, edge);
    if (s.special) gradients(s, gB, qA, Ch, true);
    else gradients(s, gB, qA, Ch, false);
#pragma unroll
    for (int k = threadIdx.x * 4; k < PART; k += THREADS * 4) {
      const Vec<float, 4> sum = load_vec<float, 4>(&pool.BC[k / TILE][k % TILE]);
      store_vec<Kept, 4>(parts + k, {{from_float<Kept>(sum.at[0]), from_float<Kept>(sum.at[1]),
                                      from_float<Kept>(sum.at[2]), from_float<Kept>(sum.at[3])}});
    }
    parts -= PART;
  };

  auto flush = [&](int i) {
    const Slot& s = pool.slot[i % SLOTS];
    const int left = (int)L - (last - i) * TILE;
    d_u_rows.copy_out(s.u[0], 32, left);
    d_dt_rows.copy_out(s.dt[0], 32, left);
    if (GATED) d_z_rows.copy_out(s.z[0], 32, left);
  };

  run_tiles(at.tiles, load, arrive, stage_in, body, stage_out, flush);

  if (mine) {
#pragma unroll 1
    for (int n = warp * STATES; n < (warp + 1) * STATES; ++n) {
      d_A[(at.row() * I + c) * N + n] = pool.dA[n][lane];
      if (d_first && at.index == 0) d_first[(batch * I + c) * N + n] = pool.carry[n][lane];
    }
  }
  __syncthreads();
  auto both = reinterpret_cast<float(*)[THREADS / 16][32]>(&pool.dt);
#pragma unroll
  for (int j = 0; j < 2; ++j) {  // the threads of a channel hold the sums of different steps
    both[0][threadIdx.x / 16][edge.c + j] = sum_D[j];
    both[1][threadIdx.x / 16][edge.c + j] = sum_bias[j];
  }
  __syncthreads();
  if (warp == 0 && mine) {
    float to_D = 0.0f, to_bias = 0.0f;
    for (int k = 0; k < THREADS / 16; ++k) {
      to_D += both[0][k][lane];
      to_bias += both[1][k][lane];
    }
    if (d_D) d_D[at.row() * I + c] = to_D;
    if (d_bias) d_bias[at.row() * I + c] = to_bias;
  }
}

// dB and dC (rows, N) from the partial sums (blocks, batch, tiles, 2 N, TILE): some steps of a state a thread, blocks in
// order.
extern "C" __global__ void scan_reduce(const Kept* parts, TB* d_B, TB* d_C, int64 blocks, int64 batches, int64 L) {
  constexpr int w = per_16_bytes<Kept>;
  const int64 tiles = (L + TILE - 1) / TILE, all = batches * tiles * PART;
  const int64 at = ((int64)blockIdx.x * blockDim.x + threadIdx.x) * w;
  if (at >= all) return;
  float sum[w] = {};
#pragma unroll 8
  for (int64 k = 0; k < blocks; ++k) {
    const Vec<Kept, w> part = load_vec<Kept, w>(parts + k * all + at);
#pragma unroll
    for (int j = 0; j < w; ++j) sum[j] += to_float(part.at[j]);
  }
  const int row = (int)(at / TILE % (2 * N));
  const int64 tile = at / PART % tiles, batch = at / PART / tiles;
  TB* to = row < N ? d_B + row : d_C + (row - N);
#pragma unroll
  for (int j = 0; j < w; ++j) {
    const int64 t = tile * TILE + at % TILE + j;
    if (t < L) to[(batch * L + t) * N] = from_float<TB>(sum[j]);
  }
}
