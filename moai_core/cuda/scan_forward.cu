// moai: kernels scan_forward; macros T=bf16 TB=bf16 N=16 WARPS=4 TEAMS=1 GATED=1 KEEPS=1 TILE=16 SHARED=49152
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=8 GATED=1 KEEPS=0 TILE=16 SHARED=196608; none on sm_90
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=8 GATED=1 KEEPS=1 TILE=16 SHARED=196608; none on sm_90
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=4 GATED=1 KEEPS=0 TILE=16 SHARED=98304; none on sm_90
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=4 GATED=1 KEEPS=1 TILE=16 SHARED=98304; none on sm_90
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=2 GATED=1 KEEPS=0 TILE=16 SHARED=65536; none on sm_90
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=2 GATED=1 KEEPS=1 TILE=16 SHARED=65536; none on sm_90
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=1 GATED=1 KEEPS=0 TILE=16 SHARED=49152; none on sm_90
// moai: macros T=bf16 TB=bf16 N=16 WARPS=2 TEAMS=1 GATED=1 KEEPS=1 TILE=16 SHARED=49152; none on sm_90
// moai: macros T=float TB=float N=64 WARPS=4 TEAMS=1 GATED=0 KEEPS=0 TILE=16 SHARED=98304; spills 160
//
// The selective scan of Mamba-1, forward: h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t;  y_t = (C_t . h_t + D u_t) silu(z_t),
// dt = softplus(raw dt + bias). Source: arXiv 2312.00752, algorithm 2; what is new is the order of the work.
//
// A lane owns one channel, a warp 32 channels and N / WARPS of their states, a block the 32 channels with all N states.
// States live in registers and time runs inside the thread, so the recurrence costs its five instructions a state and
// step: two products, an exponential, two multiply-adds. Work that is per (step, channel) and not per state (softplus,
// gate, conversions) is done once, at the edges of a tile of TILE steps, by all warps together; B and C are turned to fp32
// there too and broadcast from shared memory. WARPS > 1 gives small batches enough threads without cutting time.
//
// Few rows: a block has several teams, which take its tiles in turn. A team has a tile's B, C, dt and decays ready when the
// state that enters the tile comes from the team before it, one state after the other, so teams work at the same time.
//
// Fewer rows still, and long: time is cut into segments. scan_summary finds each segment's end state from a zero state and
// its sum of dt, whose exponential is the decay over it; every block then finds its first state from those before it.
//
//   stage_in    raw tile (arrived by asynchronous copies) -> dt, dt u, B, C in fp32
//   body        the recurrence; each warp leaves its share of C . h
//   stage_out   sum of the shares, D u, gate; the result takes u's place, from where flush stores it
//
// Macro KEEPS: 1 if a backward pass follows. Its memory: `kept`, the state before every tile, (batch, tiles, N, I), 16 bits
// for 16-bit inputs.
#include "scan.cuh"

struct alignas(16) Slot {  // one tile as it comes from memory
  T u[TILE][32], dt[TILE][32], z[TILE][32];
  TB BC[TILE][narrow_row<2 * N>];
  int mark[TILE + 1], special;
};

struct alignas(16) Pool {
  Slot slot[SLOTS];
  Rows dt, x;
  float BC[2 * N][TILE + 4];
  struct Share {
    Rows y;
  } share[WARPS];
};

struct alignas(16) Shared {
  Pool pool[TEAMS];
  // With one team, states and decay rates stay in registers.
  Baton relay[TEAMS][TEAMS > 1 ? N : 1][32];
  float rates[TEAMS > 1 ? N : 1][32];
};
static_assert(sizeof(Shared) <= SHARED, "SHARED is what the caller reserves");

// 16 warps a multiprocessor: 128 registers each, for which some architectures spill a few.
extern "C" __global__ void __launch_bounds__(THREADS * TEAMS, 16 / (WARPS * TEAMS))
    scan_forward(const T* u, const T* dt, const float* A, const TB* B, const TB* C, const float* D, const T* z,
                 const float* bias, const float* first, const int* seq_idx, const float* ends, const float* sums, T* y,
                 float* last, Kept* kept, int64 L, int64 I, int64 segments, int64 span, int64 u_batch, int64 u_step,
                 int64 dt_batch, int64 dt_step, int64 z_batch, int64 z_step, int64 B_batch, int64 B_step, int64 C_batch,
                 int64 C_step) {
  extern __shared__ __align__(16) unsigned char shared[];
  Shared& all = *reinterpret_cast<Shared*>(shared);
  Pool& pool = at_address<Pool>(keep(address_of(&all.pool[team()])));
  const int lane = threadIdx.x % 32, warp = thread() / 32;
  const Segment at(L, I, segments, span, blockIdx.x, gridDim.x);
  const int64 batch = at.batch, c0 = at.c0, c = c0 + lane;
  const bool mine = c < I;
  const Edge edge(TEAMS > 1 && !KEEPS);

  const bool begins = team() == TEAMS - 1;  // the team whose turn would be before the first tile
  float a2[STATES], h[STATES];
#pragma unroll
  for (int j = 0; j < STATES; ++j) {
    const int n = warp * STATES + j;
    a2[j] = mine ? decay_rate(A[c * N + n]) : -1.0f;
    h[j] = mine && first && begins ? first[(batch * I + c) * N + n] : 0.0f;
  }
  float bias_c[2], D_c[2];
  read_channels(bias_c, bias, c0 + edge.c, I);
  read_channels(D_c, D, c0 + edge.c, I);
  if (KEEPS) kept += (batch * ((L + TILE - 1) / TILE) + at.first) * N * I + c;

  Cursor<T, 32, true> u_rows(u + batch * u_batch + c0, u_step, 0, I - c0, (at.first + team()) * TILE, TEAMS * TILE);
  Cursor<T, 32, true> dt_rows(dt + batch * dt_batch + c0, dt_step, 2, I - c0, (at.first + team()) * TILE, TEAMS * TILE);
  Cursor<T, 32, true> z_rows(z + batch * z_batch + c0, z_step, 4, I - c0, (at.first + team()) * TILE, TEAMS * TILE);
  auto BC_rows = both_states<N>(B + batch * B_batch, C + batch * C_batch, B_step, C_step, 6,
                                (at.first + team()) * TILE, TEAMS * TILE);
  Cursor<T, 32, true> y_rows(y + batch * L * I + c0, I, 0, I - c0, (at.first + team()) * TILE, TEAMS * TILE);
  const Marker marker{seq_idx ? seq_idx + batch * L : nullptr, (int)L};

  constexpr int some = STATES < 8 ? STATES : 8;
#pragma unroll
  for (int j0 = 0; j0 < STATES; j0 += some) {
#pragma unroll 1
    for (int64 s = batch * at.count; mine && begins && s < at.row(); ++s) {  // through the segments before this one
      const float age = sums[(s * GROUPS + (warp * STATES + j0) / GROUP) * I + c];
#pragma unroll
      for (int j = j0; j < j0 + some; ++j)
        h[j] = exp2_approx(a2[j] * age) * h[j] + ends[(s * N + warp * STATES + j) * I + c];
    }
  }

  if (TEAMS > 1) {
#pragma unroll
    for (int j = 0; j < STATES; ++j) {
      const int n = warp * STATES + j;
      all.relay[team()][n][lane] = {float_bits(h[j]), begins ? 0 : -1};
      if (begins) all.rates[n][lane] = a2[j];
    }
    __syncthreads();
  }

  auto load = [&](int i) {
    Slot& s = pool.slot[slot_of(i)];
    const int t0 = at.tile(i) * TILE, left = (int)L - t0;
    u_rows.copy_in(s.u[0], 32, left);
    dt_rows.copy_in(s.dt[0], 32, left);
    if (GATED) z_rows.copy_in(s.z[0], 32, left);
    BC_rows.copy_in(s.BC[0], narrow_row<2 * N>, left);
    marker.fetch(s.mark, t0);
  };
  auto arrive = [&](int i) { marker.store(pool.slot[slot_of(i)].mark, pool.slot[slot_of(i)].special, at.tile(i) * TILE); };

  auto stage_in = [&](const Slot& s, const float(&raw)[PER][2], const float(&us)[PER][2], bool special) {
    float dts[2][PER], xs[2][PER];
#pragma unroll
    for (int k = 0; k < PER; ++k) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        dts[j][k] = softplus(raw[k][j] + bias_c[j]);
        xs[j][k] = dts[j][k] * us[k][j];
      }
    }
    if (special) {
      mark_times(dts, s.mark, edge);
      mark_values(xs, s.mark, edge);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      write_steps(pool.dt, edge.c + j, edge.t0, dts[j]);
      write_steps(pool.x, edge.c + j, edge.t0, xs[j]);
    }
    Widen<2 * N>::run(pool.BC, s.BC, s.mark, special);
  };

  // A team among several: all steps of a state, which comes from the team before and goes to the next one.
  auto relay_body = [&](int i) {
    const int turn = (int)keep(i * TEAMS + team()), begin = warp * STATES;
    float dts[TILE], xs[TILE], ys[TILE];
    read_steps(dts, pool.dt, lane, 0);
    read_steps(xs, pool.x, lane, 0);
#pragma unroll
    for (int t = 0; t < TILE; ++t) ys[t] = 0.0f;
    // Where the warp's first state stands: the team before leaves it, this one does, its decay rate, its B.
    Address before = keep(address_of(&all.relay[(team() + TEAMS - 1) % TEAMS][begin][lane]));
    Address here = keep(address_of(&all.relay[team()][begin][lane])), row = keep(address_of(&all.rates[begin][lane]));
    Address BC = keep(address_of(pool.BC[begin]));
    Kept* to = KEEPS ? kept + ((int64)turn * N + begin) * I : nullptr;
#pragma unroll 1
    for (int k = 0; k < STATES; ++k) {
      const Baton seen = look_at(before);
      const float rate = at_address<float>(row);
      float Bs[TILE], Cs[TILE], a[TILE];
      read_broadcast(Bs, &at_address<float>(BC));
#pragma unroll
      for (int t = 0; t < TILE; ++t) {
        a[t] = exp2_approx(dts[t] * rate);
        Bs[t] *= xs[t];
      }
      float state = take_over(before, turn, seen);
      read_broadcast(Cs, &at_address<float>(BC) + N * (TILE + 4));
      if (KEEPS && mine) *to = from_float<Kept>(state);
      if (KEEPS) to += I;
#pragma unroll
      for (int t = 0; t < TILE; ++t) {
        state = a[t] * state + Bs[t];
        ys[t] += Cs[t] * state;
      }
      pass_on(here, state, turn + 1);
      before += 256, here += 256, row += 128, BC += sizeof(pool.BC[0]);
    }
    write_steps(pool.share[warp].y, lane, 0, ys);
  };

  auto body = [&](int i) {
    if (TEAMS > 1) return relay_body(i);
    if (KEEPS && mine) {
      Kept* to = kept + ((int64)i * N + warp * STATES) * I;
#pragma unroll
      for (int j = 0; j < STATES; ++j) to[j * I] = from_float<Kept>(h[j]);
    }
#pragma unroll 1
    for (int t0 = 0; t0 < TILE; t0 += 8) {
      float dts[8], xs[8], ys[8];
      read_steps(dts, pool.dt, lane, t0);
      read_steps(xs, pool.x, lane, t0);
#pragma unroll
      for (int t = 0; t < 8; ++t) ys[t] = 0.0f;
#pragma unroll
      for (int j = 0; j < STATES; ++j) {
        float Bs[8], Cs[8];
        read_broadcast(Bs, &pool.BC[warp * STATES + j][t0]);
        read_broadcast(Cs, &pool.BC[N + warp * STATES + j][t0]);
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          h[j] = exp2_approx(dts[t] * a2[j]) * h[j] + xs[t] * Bs[t];
          ys[t] += Cs[t] * h[j];
        }
      }
      write_steps(pool.share[warp].y, lane, t0, ys);
    }
  };

  auto stage_out = [&](Slot& s, const float(&us)[PER][2], const float(&gate)[PER][2], bool special) {
    float sum[2][PER];
    add_shares(sum, pool.share, &Pool::Share::y, edge);
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      float out[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        out[j] = sum[j][k] + D_c[j] * us[k][j];
        if (GATED) out[j] *= gate[k][j] * sigmoid(gate[k][j]);
        if (special && s.mark[edge.t0 + k] == PAD) out[j] = 0.0f;
      }
      write_pair(&s.u[edge.row(k)][edge.c], out);
    }
  };

  auto edges = [&](int i, bool out, bool in) {
    Slot &s = pool.slot[slot_of(i)], &next = pool.slot[slot_of(i + 1)];
    float us[PER][2], gate[PER][2], next_us[PER][2], next_raw[PER][2];
    if (out && in && !(s.special | next.special)) {  // without branches
      read_edge(us, s.u, edge);
      if (GATED) read_edge(gate, s.z, edge);
      read_edge(next_us, next.u, edge);
      read_edge(next_raw, next.dt, edge);
      stage_out(s, us, gate, false);
      stage_in(next, next_raw, next_us, false);
      return;
    }
    if (out) {
      read_edge(us, s.u, edge);
      if (GATED) read_edge(gate, s.z, edge);
      stage_out(s, us, gate, s.special);
    }
    if (in) {
      read_edge(next_us, next.u, edge);
      read_edge(next_raw, next.dt, edge);
      stage_in(next, next_raw, next_us, next.special);
    }
  };

  auto flush = [&](int i) { y_rows.put(y_rows.take(pool.slot[slot_of(i)].u[0], 32), (int)L - at.tile(i) * TILE); };

  run_tiles(at.turns(), load, arrive, edges, body, flush);

  // Found anew: no register holds it through the tiles.
  const Segment end(L, I, segments, span, (int)keep(blockIdx.x), gridDim.x);
  const int64 own = end.c0 + lane;
  if (own < I && end.index == end.count - 1 && team() == (end.tiles - 1) % TEAMS) {
#pragma unroll
    for (int j = 0; j < STATES; ++j) {
      const int n = warp * STATES + j;
      last[(end.batch * I + own) * N + n] = TEAMS > 1 ? bits_float(all.relay[team()][n][lane].value) : h[j];
    }
  }
}
