// moai: kernels scan_backward, scan_reduce; macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=1 GATED=1 TILE=16 SHARED=65536; none on sm_90
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=2 GATED=1 TILE=16 SHARED=131072; none on sm_90
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=4 GATED=1 TILE=16 SHARED=229376; none on sm_90
// moai: macros T=float TB=float N=64 WARPS=2 TEAMS=1 GATED=1 TILE=8 SHARED=98304
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
// times a matrix of ones and zeros leave, for each group of 4 lanes, the sum of each value; the groups are added through
// shared memory, for several states at once. tf32 drops bits; for fp32 inputs each number goes in two parts, so that 22
// bits count. Sums over a row's blocks are written as partial sums and added in a fixed order by scan_reduce: no atomics,
// the same bits every time.
//
// Segments of a row take their carry from scan_summary, or, given `flags`, from the segment behind them, which leaves it
// in `ends` (see Chain): no pass of its own, for rows that fill the GPU by themselves and would leave it half empty at
// the end.
#include "scan.cuh"

constexpr bool EXACT = sizeof(T) == 4;
constexpr int VALUES = 2 * TILE;            // summed over channels, of one state: dB of each step, then dC
constexpr int FRAGMENTS = VALUES / 16;      // of the tensor cores' results
constexpr bool SLOPES = sizeof(T) == 2;     // of softplus and gate are kept from a tile's beginning to its end
constexpr bool RATES = N <= 32;             // decay rates in shared memory, where it has room
constexpr int PART = 2 * N * TILE;          // numbers of a tile's partial sums
constexpr int BATCH = STATES < 8 ? STATES : 8;  // states whose groups of lanes are added at once
static_assert(STATES % BATCH == 0 && BATCH * FRAGMENTS % 8 == 0, "a warp's states are batches, a batch's sums passes");

struct alignas(16) Slot {  // one tile as it comes from memory
  T u[TILE][32], dt[TILE][32], z[TILE][32], g[TILE][32];
  TB BC[TILE][narrow_row<2 * N>];
  Kept kept[N][32];
  int mark[TILE + 1], special;
};

// What a warp leaves to its team: sums over its states, C h, g B and q A log2(e). Before, while it goes through the states,
// the sums of a batch that its groups of lanes have for one another.
union alignas(16) Share {
  struct {
    Rows Ch, gB, qA;
  };
  float groups[FRAGMENTS][BATCH][32][4];
};

// The slope of softplus, and the gate's sigmoid.
template <bool there>
struct alignas(16) Slopes {
  Rows rows[2];
};
template <>
struct alignas(16) Slopes<false> {};

struct alignas(16) Pool {
  Slot slot[SLOTS];
  Rows dt, x, dy;
  Slopes<SLOPES> slopes;
  float BC[2 * N][TILE + 4];
  Share share[WARPS];
  float dA[N][32];  // each one thread's; here because registers can't be indexed
};

struct alignas(16) Shared {
  Pool pool[TEAMS];
  Baton relay[TEAMS > 1 ? TEAMS : 1][TEAMS > 1 ? N : 1][32];  // the gradient of the state on its way through the teams
  float carry[TEAMS > 1 ? 1 : N][32];                         // it where there is one team
  float a2[RATES ? N : 1][32];
  int number;  // of the block, where blocks are chained
};
static_assert(sizeof(Shared) <= SHARED, "SHARED is what the caller reserves");

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

// Adds the 8 groups' sums of a batch of states, the first of which is n: 4 consecutive steps of a state's dB or dC a lane
// and pass, stored as partial sums.
DEVICE void add_groups(Kept* parts, int n, const float (&groups)[FRAGMENTS][BATCH][32][4], int lane) {
  // Every second state's groups are taken in another order, so that 8 lanes touch all 32 banks.
  const int state = lane / 4 % BATCH, swap = state % 2;
#pragma unroll
  for (int pass = 0; pass < BATCH * FRAGMENTS / 8; ++pass) {
    const int fragment = pass * (8 / BATCH) + lane / 4 / BATCH;
    const float(*even)[4] = &groups[fragment][state][lane % 4 + swap * 4], (*odd)[4] = even - swap * 8;
    Vec<float, 4> sum = load_vec<float, 4>(even[0]);
#pragma unroll
    for (int k = 1; k < 8; ++k) {
      const Vec<float, 4> v = load_vec<float, 4>((k % 2 ? odd : even)[k * 4]);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.at[j] += v.at[j];
    }
    Vec<Kept, 4> to;
#pragma unroll
    for (int j = 0; j < 4; j += 2) store_vec<Kept, 2>(&to.at[j], pair_from_floats<Kept>(sum.at[j], sum.at[j + 1]));
    const int value = fragment * 16 + lane % 4 * 4;
    store_vec<Kept, 4>(parts + (value / TILE * N + n + state) * TILE + value % TILE, to);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS * TEAMS, 8 / (WARPS * TEAMS))
    scan_backward(const T* u, const T* dt, const float* A, const TB* B, const TB* C, const float* D, const T* z,
                  const float* bias, const int* seq_idx, const Kept* kept, const T* g, const float* d_last,
                  float* ends, const float* sums, int* flags, T* d_u, T* d_dt, T* d_z, float* d_A, Kept* parts,
                  float* d_D, float* d_bias, float* d_first, int64 L, int64 I, int64 segments, int64 span,
                  int64 u_batch, int64 u_step, int64 dt_batch, int64 dt_step, int64 z_batch, int64 z_step,
                  int64 B_batch, int64 B_step, int64 C_batch, int64 C_step, int64 g_batch, int64 g_step,
                  int64 d_z_batch, int64 d_z_step) {
  extern __shared__ __align__(16) unsigned char shared[];
  Shared& all = *reinterpret_cast<Shared*>(shared);
  Pool& pool = TEAMS > 1 ? at_address<Pool>(keep(address_of(&all.pool[team()]))) : all.pool[0];
  const int lane = threadIdx.x % 32, warp = thread() / 32;
  const Chain chain{flags};
  if (chain && threadIdx.x == 0) all.number = chain.begin();
  if (chain) __syncthreads();
  // A number that the compiler sees to be the same in all lanes.
  const Segment at(L, I, segments, span, chain ? __reduce_or_sync(0xffffffffu, all.number) : blockIdx.x, gridDim.x,
                   bool(chain));
  const int64 batch = at.batch, c0 = at.c0, c = c0 + lane;
  const bool mine = c < I;
  const int row_tiles = (int)((L + TILE - 1) / TILE), last = at.first + at.tiles - 1 - team();  // the team's last tile
  const Edge edge(TEAMS <= 2);

  uint32 one[8];
#pragma unroll
  for (int p = 0; p < 8; ++p) one[p] = keep(lane / 4 == p ? 0x3f800000u : 0u);
  float bias_c[2], D_c[2], sum_D[2] = {0.0f, 0.0f}, sum_bias[2] = {0.0f, 0.0f};
  read_channels(bias_c, bias, c0 + edge.c, I);
  read_channels(D_c, D, c0 + edge.c, I);

  // Tiles are walked from the last to the first: rows begin at the last tile, tiles lie backwards.
  Cursor<T, 32, true> u_rows(u + batch * u_batch + c0, u_step, 0, I - c0, last * TILE, -TEAMS * TILE);
  Cursor<T, 32, true> dt_rows(dt + batch * dt_batch + c0, dt_step, 2, I - c0, last * TILE, -TEAMS * TILE);
  Cursor<T, 32, true> z_rows(z + batch * z_batch + c0, z_step, 4, I - c0, last * TILE, -TEAMS * TILE);
  Cursor<T, 32, true> g_rows(g + batch * g_batch + c0, g_step, 6, I - c0, last * TILE, -TEAMS * TILE);
  auto BC_rows = both_states<N>(B + batch * B_batch, C + batch * C_batch, B_step, C_step, 1, last * TILE,
                                -TEAMS * TILE);
  Cursor<Kept, 32, false, N> kept_rows(kept + batch * row_tiles * N * I + c0, I, 5, I - c0, last * N, -TEAMS * N);
  Cursor<T, 32, true> d_u_rows(d_u + batch * L * I + c0, I, 0, I - c0, last * TILE, -TEAMS * TILE);
  Cursor<T, 32, true> d_dt_rows(d_dt + batch * L * I + c0, I, 2, I - c0, last * TILE, -TEAMS * TILE);
  Cursor<T, 32, true> d_z_rows(d_z + batch * d_z_batch + c0, d_z_step, 4, I - c0, last * TILE, -TEAMS * TILE);
  const Marker marker{seq_idx ? seq_idx + batch * L : nullptr, (int)L};
  const bool follows = at.index + 1 < at.count;  // the last segment needs nobody
  if (follows && chain) chain.wait((at.row() + 1) * at.blocks + at.block);
  const bool begins = team() == TEAMS - 1;  // the team whose turn would be before the last tile
  constexpr int some = STATES < 8 ? STATES : 8;
#pragma unroll 1
  for (int n0 = warp * STATES; n0 < (warp + 1) * STATES; n0 += some) {
    float a2[some], carry[some];
#pragma unroll
    for (int j = 0; j < some; ++j) {
      a2[j] = mine ? decay_rate(A[c * N + n0 + j]) : -1.0f;
      carry[j] = mine && begins && d_last ? d_last[(batch * I + c) * N + n0 + j] : 0.0f;
      if (mine && begins && follows && chain) carry[j] = ends[((at.row() + 1) * N + n0 + j) * I + c];
    }
#pragma unroll 2
    for (int64 s = (batch + 1) * at.count - 1; mine && begins && !chain && s > at.row(); --s) {  // the segments after this
      const float age = sums[(s * GROUPS + n0 / GROUP) * I + c];
#pragma unroll
      for (int j = 0; j < some; ++j) carry[j] = exp2_approx(a2[j] * age) * carry[j] + ends[(s * N + n0 + j) * I + c];
    }
#pragma unroll
    for (int j = 0; j < some; ++j) {
      if (RATES && begins) all.a2[n0 + j][lane] = a2[j];
      if (TEAMS > 1) all.relay[team()][n0 + j][lane] = {float_bits(carry[j]), begins ? 0 : -1};
      else all.carry[n0 + j][lane] = carry[j];
      pool.dA[n0 + j][lane] = 0.0f;
    }
  }
  if (TEAMS > 1) __syncthreads();
  const int64 batches = gridDim.x / at.blocks / at.count;
  parts += ((at.block * batches + batch) * row_tiles + last) * (int64)PART;

  auto load = [&](int i) {
    Slot& s = pool.slot[slot_of(i)];
    const int t0 = (last - i * TEAMS) * TILE, left = (int)L - t0;
    u_rows.copy_in(s.u[0], 32, left);
    dt_rows.copy_in(s.dt[0], 32, left);
    if (GATED) z_rows.copy_in(s.z[0], 32, left);
    g_rows.copy_in(s.g[0], 32, left);
    BC_rows.copy_in(s.BC[0], narrow_row<2 * N>, left);
    kept_rows.copy_in(s.kept[0], 32, N);
    marker.fetch(s.mark, t0);
  };
  auto arrive = [&](int i) { marker.store(pool.slot[slot_of(i)].mark, pool.slot[slot_of(i)].special, (last - i * TEAMS) * TILE); };

  Rows* const slopes = reinterpret_cast<Rows*>(&pool.slopes);
  // A thread's numbers of a tile. All are read before any is written: the compiler can't know that they don't overlap.
  struct Numbers {
    float dt[PER][2], u[PER][2], g[PER][2], z[PER][2];
  };
  auto read = [&](const Slot& s) {
    Numbers of;
    read_edge(of.u, s.u, edge);
    if (GATED) read_edge(of.z, s.z, edge);
    read_edge(of.g, s.g, edge);
    read_edge(of.dt, s.dt, edge);
    return of;
  };

  auto stage_in = [&](const Slot& s, const Numbers& of, bool special) {
    float dts[2][PER], xs[2][PER], dys[2][PER], slope[2][PER], open[2][PER];
#pragma unroll
    for (int k = 0; k < PER; ++k) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float before = of.dt[k][j] + bias_c[j], e = exp2_approx(-LOG2E * fabsf(before));
        dts[j][k] = softplus(before, e);
        if (SLOPES) {
          const float half = reciprocal_approx(1.0f + e);
          slope[j][k] = before < 0.0f ? e * half : half;
        }
        open[j][k] = GATED ? sigmoid(of.z[k][j]) : 1.0f;
        xs[j][k] = dts[j][k] * of.u[k][j];
        dys[j][k] = GATED ? of.g[k][j] * (of.z[k][j] * open[j][k]) : of.g[k][j];
      }
    }
    if (special) {
      mark_times(dts, s.mark, edge);
      mark_values(xs, s.mark, edge);
      mark_values(dys, s.mark, edge);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      write_steps(pool.dt, edge.c + j, edge.t0, dts[j]);
      write_steps(pool.x, edge.c + j, edge.t0, xs[j]);
      write_steps(pool.dy, edge.c + j, edge.t0, dys[j]);
      if (SLOPES) write_steps(slopes[0], edge.c + j, edge.t0, slope[j]);
      if (SLOPES && GATED) write_steps(slopes[1], edge.c + j, edge.t0, open[j]);
    }
    Widen<2 * N>::run(pool.BC, s.BC, s.mark, special);
  };

  auto body = [&](int i) {
    Slot& s = pool.slot[slot_of(i)];
    Share& share = pool.share[warp];
    const int begin = warp * STATES, turn = i * TEAMS + team();
    float dts[TILE], xs[TILE], dys[TILE], gB[TILE], qA[TILE], Ch[TILE];
    read_steps(dts, pool.dt, lane, 0);
    read_steps(xs, pool.x, lane, 0);
    read_steps(dys, pool.dy, lane, 0);
#pragma unroll
    for (int t = 0; t < TILE; ++t) gB[t] = qA[t] = Ch[t] = 0.0f;

    // Where the state at work stands: its share of dA, its B, what was kept of it, the sums of groups, its decay rate, the
    // gradient that this team leaves, and the one that the team before does.
    Address row = keep(address_of(&pool.dA[begin][lane])), BC = keep(address_of(pool.BC[begin]));
    Address kept_row = keep(address_of(&s.kept[begin][lane])), sums_row = keep(address_of(share.groups[0][0][lane]));
    Address rate_row = TEAMS > 1 ? keep(address_of(&all.a2[RATES ? begin : 0][lane])) : 0;
    Address here = TEAMS > 1 ? keep(address_of(&all.relay[team()][begin][lane])) : 0;
    Address before = TEAMS > 1 ? keep(address_of(&all.relay[(team() + TEAMS - 1) % TEAMS][begin][lane])) : 0;
    // From a team's dA, which is its pool's end, to what follows where it is the only one.
    constexpr int to_carry = sizeof(pool.dA) + sizeof(all.relay), to_rate = to_carry + sizeof(all.carry);
    constexpr int BC_step = (TILE + 4) * 4, kept_step = 32 * sizeof(Kept);
    auto further = [&] {
      row += 128, BC += BC_step, kept_row += kept_step, sums_row += 512, here += 256;
      if (TEAMS > 1) rate_row += 128;
    };
    // Of the state at work, or of the one `more` behind it; k is its number.
    auto rate_of = [&](int k, int more) {
      if (!RATES) return mine ? decay_rate(A[c * N + begin + k + more]) : -1.0f;
      return TEAMS > 1 ? at_address<float>(rate_row, more * 128) : at_address<float>(row, to_rate + more * 128);
    };

    float rate, next_rate, Bs[TILE], Cs[TILE], a[TILE], h[TILE + 1];
    Baton seen;

    // B, C and the decays of the state, of the steps from t to t + 3.
    auto ready = [&](int more, int t) {
      read_four(&Bs[t], &at_address<float>(BC, more * BC_step + t * 4));
      read_four(&Cs[t], &at_address<float>(BC, (N + more) * BC_step + t * 4));
#pragma unroll
      for (int j = t; j < t + 4; ++j) a[j] = exp2_approx(dts[j] * next_rate);
    };
    auto ahead = [&](float first) {
      h[0] = first;
#pragma unroll
      for (int t = 0; t < TILE; ++t) {
        h[t + 1] = a[t] * h[t] + xs[t] * Bs[t];
        Ch[t] += Cs[t] * h[t + 1];
      }
      rate = next_rate;
    };
    // State k's way back, and beside it the next state's way ahead: what one has used makes room for the other's numbers.
    auto back_and_ahead = [&](int k, bool more) {
      float first = 0.0f, carry, dA[2] = {0.0f, 0.0f}, dB[4], dC[4], sums[FRAGMENTS][4] = {};
      if (TEAMS > 1) carry = take_over(before, turn, seen);
      else carry = at_address<float>(row, to_carry);
      if (more) {
        next_rate = rate_of(k, 1);
        first = to_float(at_address<Kept>(kept_row, kept_step));
        before += 256;
        if (TEAMS > 1) seen = look_at(before);
      }
#pragma unroll
      for (int t = TILE - 1; t >= 0; --t) {
        const float back = Cs[t] * dys[t] + carry;
        dC[t % 4] = h[t + 1] * dys[t];
        dB[t % 4] = back * xs[t];
        gB[t] += back * Bs[t];
        carry = a[t] * back;
        const float q = carry * h[t];
        qA[t] += q * rate;
        dA[t % 2] += q * dts[t];
        if (t % 4 == 0) {
          add_lanes(sums[t / 16], one, t % 16 / 4, dB);
          add_lanes(sums[(TILE + t) / 16], one, (TILE + t) % 16 / 4, dC);
          if (more) ready(1, t);
        }
      }
      if (TEAMS > 1) pass_on(here, carry, turn + 1);
      else at_address<float>(row, to_carry) = carry;
      at_address<float>(row) += dA[0] + dA[1];
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) {
        const Vec<float, 4> of_group = {{sums[f][0], sums[f][1], sums[f][2], sums[f][3]}};
        at_address<Vec<float, 4>>(sums_row, f * BATCH * 512) = of_group;
      }
      further();
      if (more) ahead(first);
    };
    auto add_batch = [&](int k) {
      __syncwarp();
      add_groups(parts, begin + k, share.groups, lane);
      __syncwarp();
      sums_row -= BATCH * 512;
    };

    next_rate = rate_of(0, 0);
    if (TEAMS > 1) seen = look_at(before);
#pragma unroll
    for (int t = 0; t < TILE; t += 4) ready(0, t);
    ahead(to_float(at_address<Kept>(kept_row)));
#pragma unroll 1
    for (int k = 0; k < STATES - 1; ++k) {
      back_and_ahead(k, true);
      if (STATES > BATCH && k % BATCH == BATCH - 1) add_batch(k - (BATCH - 1));
    }
    row = keep(row), sums_row = keep(sums_row), here = keep(here);  // not computed again because k is known
    back_and_ahead(STATES - 1, false);
    add_batch(STATES - BATCH);
    parts -= TEAMS * PART;
    write_steps(share.gB, lane, 0, gB);
    write_steps(share.qA, lane, 0, qA);
    write_steps(share.Ch, lane, 0, Ch);
  };

  auto gradients = [&](Slot& s, const Numbers& of, const float(&gB)[2][PER], const float(&qA)[2][PER],
                       const float(&Ch)[2][PER], bool special) {
    float dts[2][PER], slope[2][PER], open[2][PER];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      read_steps(dts[j], pool.dt, edge.c + j, edge.t0);
      if (SLOPES) read_steps(slope[j], slopes[0], edge.c + j, edge.t0);
      if (SLOPES && GATED) read_steps(open[j], slopes[1], edge.c + j, edge.t0);
    }
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int t = edge.t0 + k;
      float to_u[2], to_dt[2], to_z[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float raw = of.dt[k][j], u = of.u[k][j], g = of.g[k][j], gate = of.z[k][j];
        float dy = g;
        if (GATED) {
          const float sig = SLOPES ? open[j][k] : sigmoid(gate), gated = gate * sig;
          to_z[j] = g * (Ch[j][k] + D_c[j] * u) * (sig + gated * (1.0f - sig));  // the slope of silu
          dy *= gated;
        }
        const float before = raw + bias_c[j];
        const float step = special && s.mark[t] == RESET ? softplus(before) : dts[j][k];
        to_u[j] = step * gB[j][k] + D_c[j] * dy;
        to_dt[j] = (u * gB[j][k] + LN2 * qA[j][k]) * (SLOPES ? slope[j][k] : sigmoid(before));
        float to_D = dy * u;
        if (special && s.mark[t] == PAD) to_u[j] = to_dt[j] = to_z[j] = to_D = 0.0f;
        sum_D[j] += to_D;
        sum_bias[j] += to_dt[j];
      }
      write_pair(&s.u[edge.row(k)][edge.c], to_u);
      write_pair(&s.dt[edge.row(k)][edge.c], to_dt);
      if (GATED) write_pair(&s.z[edge.row(k)][edge.c], to_z);
    }
  };

  auto stage_out = [&](Slot& s, const Numbers& of, bool special) {
    float gB[2][PER], qA[2][PER], Ch[2][PER];
    add_shares(gB, pool.share, &Share::gB, edge);
    add_shares(qA, pool.share, &Share::qA, edge);
    add_shares(Ch, pool.share, &Share::Ch, edge);
    gradients(s, of, gB, qA, Ch, special);
  };

  auto edges = [&](int i, bool out, bool in) {
    Slot &s = pool.slot[slot_of(i)], &next = pool.slot[slot_of(i + 1)];
    if (out && in && !(s.special | next.special)) {  // without branches
      const Numbers of = read(s), of_next = read(next);
      stage_out(s, of, false);
      stage_in(next, of_next, false);
    } else {
      if (out) stage_out(s, read(s), s.special);
      if (in) stage_in(next, read(next), next.special);
    }
  };

  auto flush = [&](int i) {
    const Slot& s = pool.slot[slot_of(i)];
    const int t0 = (last - i * TEAMS) * TILE, left = (int)L - t0;
    const auto to_u = d_u_rows.take(s.u[0], 32), to_dt = d_dt_rows.take(s.dt[0], 32);
    const auto to_z = GATED ? d_z_rows.take(s.z[0], 32) : to_u;
    d_u_rows.put(to_u, left);
    d_dt_rows.put(to_dt, left);
    if (GATED) d_z_rows.put(to_z, left);
  };

  run_tiles(at.turns(), load, arrive, edges, body, flush);

  if (TEAMS > 1) __syncthreads();
  if (mine && team() == 0) {
#pragma unroll 1
    for (int n = warp * STATES; n < (warp + 1) * STATES; ++n) {
      float dA = 0.0f;
      for (int k = 0; k < TEAMS; ++k) dA += all.pool[k].dA[n][lane];
      d_A[(at.row() * I + c) * N + n] = dA;
      const float carry = TEAMS > 1 ? bits_float(all.relay[(at.tiles - 1) % TEAMS][n][lane].value) : all.carry[n][lane];
      if (d_first && at.index == 0) d_first[(batch * I + c) * N + n] = carry;
      if (chain && at.index > 0) ends[(at.row() * N + n) * I + c] = carry;
    }
  }
  if (chain && at.index > 0) chain.finish(at.row() * at.blocks + at.block);
  __syncthreads();
  constexpr int each = THREADS / 16 * TEAMS;  // threads of a channel; they hold the sums of different steps
  static_assert(2 * each * 32 * 4 <= sizeof(Pool), "room for their sums");
  auto both = reinterpret_cast<float(*)[each][32]>(shared);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    both[0][threadIdx.x / 16][edge.c + j] = sum_D[j];
    both[1][threadIdx.x / 16][edge.c + j] = sum_bias[j];
  }
  __syncthreads();
  if (threadIdx.x < 32 && mine) {
    float to_D = 0.0f, to_bias = 0.0f;
    for (int k = 0; k < each; ++k) {
      to_D += both[0][k][lane];
      to_bias += both[1][k][lane];
    }
    if (d_D) d_D[at.row() * I + c] = to_D;
    if (d_bias) d_bias[at.row() * I + c] = to_bias;
  }
}

// One number of a parameter's gradient from the sums of its rows and segments, in order.
DEVICE void add_rows(float* to, const float* parts, int64 k, int64 size, int64 rows) {
  float sum = 0.0f;
#pragma unroll 8
  for (int64 r = 0; r < rows; ++r) sum += parts[r * size + k];
  to[k] = sum;
}

constexpr int COLUMNS = 64, SHARES = 4;  // of a block of scan_reduce

// dB and dC (rows, N) from the partial sums (blocks, batch, tiles, 2 N, TILE): some steps of a state a thread, SHARES of
// which add a share of the blocks each, in order; the shares are added in order, too. The grid's blocks behind those make
// the gradients of A (I, N), D and the bias (I) from those of `rows` rows and segments, where they aren't null: a number a
// thread.
extern "C" __global__ void __launch_bounds__(COLUMNS* SHARES)
    scan_reduce(const Kept* parts, TB* d_B, TB* d_C, const float* part_A, const float* part_D, const float* part_bias,
                float* d_A, float* d_D, float* d_bias, int64 blocks, int64 batches, int64 L, int64 I, int64 rows) {
  constexpr int w = per_16_bytes<Kept>;
  __shared__ float others[SHARES - 1][w][COLUMNS];
  const int64 tiles = (L + TILE - 1) / TILE, all = batches * tiles * PART, first = (all / w + COLUMNS - 1) / COLUMNS;
  if (blockIdx.x >= first) {
    const int64 k = (blockIdx.x - first) * (COLUMNS * SHARES) + threadIdx.x;
    if (part_A && k < I * N) add_rows(d_A, part_A, k, I * N, rows);
    if (part_D && k < I) add_rows(d_D, part_D, k, I, rows);
    if (part_bias && k < I) add_rows(d_bias, part_bias, k, I, rows);
    return;
  }
  const int column = threadIdx.x % COLUMNS, share = threadIdx.x / COLUMNS;
  const int64 at = ((int64)blockIdx.x * COLUMNS + column) * w;
  const int64 begin = blocks * share / SHARES, end = at < all ? blocks * (share + 1) / SHARES : begin;
  float sum[w] = {};
#pragma unroll 8
  for (int64 k = begin; k < end; ++k) {
    const Vec<Kept, w> part = load_vec<Kept, w>(parts + k * all + at);
#pragma unroll
    for (int j = 0; j < w; ++j) sum[j] += to_float(part.at[j]);
  }
#pragma unroll
  for (int j = 0; j < w; ++j)
    if (share > 0) others[share - 1][j][column] = sum[j];
  __syncthreads();
  if (share > 0 || at >= all) return;
  const int row = (int)(at / TILE % (2 * N));
  const int64 tile = at / PART % tiles, batch = at / PART / tiles;
  TB* to = row < N ? d_B + row : d_C + (row - N);
#pragma unroll
  for (int j = 0; j < w; ++j) {
#pragma unroll
    for (int k = 0; k < SHARES - 1; ++k) sum[j] += others[k][j][column];
    const int64 t = tile * TILE + at % TILE + j;
    if (t < L) to[(batch * L + t) * N] = from_float<TB>(sum[j]);
  }
}
