// moai: kernels decode_stream
// moai: macros T=bf16 NT=8 DEPTH=8 FLIGHT=3 UNIT=4 XDEPTH=4 TEAMS=1 SHARE=64 CHUNKS=64 SLICE=64 END=CONV N=16 RANK=128 KC=4 WEIGHT=Plain,float,0
// moai: macros T=bf16 NT=8 DEPTH=7 FLIGHT=2 UNIT=4 XDEPTH=3 TEAMS=2 SHARE=48 CHUNKS=64 SLICE=64 END=GATE N=16 RANK=128 KC=4 WEIGHT=Plain,float,0
// moai: macros T=bf16 NT=8 DEPTH=5 FLIGHT=2 UNIT=4 XDEPTH=3 TEAMS=2 SHARE=128 CHUNKS=176 SLICE=24 END=SUMS N=0 RANK=0 KC=2 WEIGHT=Plain,float,0
// moai: macros T=bf16 NT=1 DEPTH=10 FLIGHT=3 UNIT=4 XDEPTH=16 TEAMS=1 SHARE=64 CHUNKS=64 SLICE=64 END=CONV N=16 RANK=128 KC=4 WEIGHT=Plain,float,0
// moai: macros T=bf16 NT=8 DEPTH=4 FLIGHT=2 UNIT=4 XDEPTH=4 TEAMS=1 SHARE=64 CHUNKS=16 SLICE=16 END=CONV N=16 RANK=128 KC=4 WEIGHT=Int4,fp16,128
// moai: macros T=bf16 NT=8 DEPTH=3 FLIGHT=1 UNIT=4 XDEPTH=4 TEAMS=2 SHARE=48 CHUNKS=16 SLICE=16 END=GATE N=16 RANK=128 KC=4 WEIGHT=Int4,fp16,128
// moai: macros T=bf16 NT=8 DEPTH=2 FLIGHT=1 UNIT=4 XDEPTH=4 TEAMS=2 SHARE=128 CHUNKS=44 SLICE=8 END=SUMS N=0 RANK=0 KC=2 WEIGHT=Int4,fp16,128
// moai: macros T=bf16 NT=1 DEPTH=2 FLIGHT=1 UNIT=4 XDEPTH=8 TEAMS=2 SHARE=128 CHUNKS=32 SLICE=4 END=SUMS N=0 RANK=0 KC=2 WEIGHT=Int4,fp16,128
// moai: macros T=fp16 NT=4 DEPTH=4 FLIGHT=3 UNIT=4 XDEPTH=8 TEAMS=1 SHARE=64 CHUNKS=11 SLICE=12 END=CONV N=64 RANK=64 KC=3 WEIGHT=Int4,fp16,256
// moai: macros T=fp16 NT=2 DEPTH=4 FLIGHT=2 UNIT=4 XDEPTH=8 TEAMS=2 SHARE=64 CHUNKS=11 SLICE=12 END=GATE N=8 RANK=32 KC=3 WEIGHT=Int8,fp16,0
//
// W x for 2 to 64 rows on Hopper, with what stands behind it: a block has all of K for a few rows of W, so its sums are
// whole when it ends, and nothing has to be added up in memory; only where rows of W are few does it have a slice of K.
// A tile has 64 rows of W and belongs to a team of four warps (wgmma, PTX ISA 9.7.15: W from registers, so every format of
// gemv.cuh is decoded on the way, x from shared memory). W comes through a ring that a warp of its own fills for each
// team, x through one of the block, in the order in which tensor cores want it ("arranged", decode.cuh), by bulk copies of
// another warp: warps that multiply take 5 cycles an instruction, and wait for it where they have anything else to do.
//
// Order of k. A product of 16 columns takes the columns 2t, 2t + 1, 2t + 8, 2t + 9 of W from lane t of 4. Weights of 16 bits
// come so by ldmatrix. Others are read in pieces of 16 bytes: a lane's piece stands for all of its columns in several
// products, and x is laid out so that it meets them. Product q has, for both halves of its columns and each 8 rows of x,
// 128 bytes: row r at 16 r, lane t at 4 t.
//
//   T       type of x, 16 bits              NT      tiles of 8 rows of x: 1, 2, 4 or 8
//   DEPTH   units of W's ring               UNIT    chunks (64 bytes of a row) that come together: 4
//   FLIGHT  units of a team on their way    XDEPTH  stages of x's ring, 8 products
//   TEAMS   tiles of a block                SHARE   rows (GATE: pairs) of a block
//   WEIGHT  format, type of scales, columns that share one (0: a row, or none)
//   CHUNKS  of a row of W; SLICE of them, a multiple of UNIT, are a block's
//   END     GATE: y = silu(gate) up, with 8 rows of each in a warp; CONV: in_proj's, of whole tiles of u or z: the
//           convolution's step of width KC, and of each tile of u its share of x_proj (RANK + 2 N rows);
//           SUMS: nothing, of a slice of K
#include "barrier.cuh"
#include "decode_hopper.cuh"

#define GATE 1
#define CONV 2
#define SUMS 3

template <int n>
constexpr int LOG2 = 1 + LOG2<n / 2>;
template <>
constexpr int LOG2<1> = 0;

constexpr int WARPS = 4 * TEAMS, SIDE = END == CONV ? 8 : 1 + TEAMS;  // warps that multiply; others: one brings x, one a
                                                                     // team's W, and the rest is for what is behind
constexpr int THREADS = 32 * (WARPS + SIDE), STEPS = F::COLUMNS / 4;
constexpr int AT_ONCE = 8 / STEPS;                         // chunks whose products are under way together
constexpr int X_STAGE = 8 * PRODUCT;                       // bytes: AT_ONCE chunks
constexpr int STAGE = UNIT * (W::GROUP ? 68 : 64);         // words of 16 bytes: chunks, then 16 rows' scales of each
constexpr bool PAIRS = END == GATE;                        // a warp has 8 rows of both weights
constexpr int OWN = PAIRS ? 8 : 16;                        // rows (pairs) of a warp
constexpr int ACTIVE = (SHARE + OWN - 1) / OWN;            // warps that have rows
constexpr int ROW = CHUNKS * 64;                           // bytes of a row of W
constexpr bool EVEN = CHUNKS % UNIT == 0;
constexpr int GROUPS = W::GROUP ? (CHUNKS - 1) / (W::GROUP / 128) + 1 : 1;  // scales of a row
constexpr int SHIFT = LOG2<W::GROUP ? W::GROUP / 128 : 1>;  // a scale's chunks
constexpr int BUFFERS = AT_ONCE == UNIT ? 1 : 2;  // fragments: those of the next products are decoded beside these
static_assert(UNIT == 4 && UNIT % AT_ONCE == 0 && SLICE % UNIT == 0, "16 lanes copy a row's part of a unit");

// ---- Rings. A unit of W has 16 rows of a warp and UNIT chunks of each. A chunk's four pieces of 16 bytes stand so that a
// warp reads them without conflicts: weights of 16 bits, of which ldmatrix takes 8 rows at once, swizzled.

// A team's W, by a warp that does nothing else, so that its copies wait neither for products nor for the kernels in front:
// FLIGHT units are on their way, and the ring fills. Lanes of one row copy neighbouring bytes. What isn't there of a row's
// last unit becomes zero; rows that aren't there are left out, as nobody asks for their results.
struct Feed {
  const unsigned char *upper, *lower;  // this lane's part of the next unit, of a warp's first row and of that 8 rows, or pairs, behind
  const fp16* scales;                  // of the row of the first warp whose scales this lane copies
  int rows, chunk, end, place;         // rows: that there are from the team's first on
  unsigned long long policy;

  template <int ROWS>
  DEVICE void row(Words* to, int lane, const unsigned char* from, bool here) const {
    const int piece = F::BITS == 16 ? (lane % 4 ^ ROWS / 2 % 4) : lane % 4;
    copy_weight(to + place + piece + ROWS / 8 * 32 + ROWS % 8 * 4, from, here, policy);
  }
  DEVICE void unit(Words* to, int lane) {
    const bool here = EVEN || chunk + lane % 16 / 4 < end;
#pragma unroll
    for (int w = 0; w < 4; w++) {
      Words* const own = to + w * STAGE;
      if (w * OWN < rows) {
        const unsigned char* const from = upper + (int64)w * OWN * ROW;
        row<0>(own, lane, from, here), row<2>(own, lane, from + 2 * ROW, here);
        row<4>(own, lane, from + 4 * ROW, here), row<6>(own, lane, from + 6 * ROW, here);
      }
      if (PAIRS ? w * OWN < rows : w * OWN + 8 < rows) {
        const unsigned char* const from = lower + (int64)w * OWN * ROW;
        row<8>(own, lane, from, here), row<10>(own, lane, from + 2 * ROW, here);
        row<12>(own, lane, from + 4 * ROW, here), row<14>(own, lane, from + 6 * ROW, here);
      }
      if constexpr (W::GROUP > 0) {
#pragma unroll
        for (int k = 0; k < UNIT; k += 2) {
          const int at = k + lane / 16;
          // 4 bytes hold two groups' scales.
          const auto index = (lane % 8 * GROUPS + ((chunk + at) >> SHIFT) & ~1) - lane % 8 * GROUPS;
          if (w * OWN + (PAIRS ? 0 : lane % 16 / 8 * 8) < rows && (EVEN || chunk + at < end))
            copy_async_4((uint32*)(own + UNIT * 64) + at * 16 + lane % 16, scales + w * OWN * GROUPS + index);
        }
      }
    }
    copy_async_commit();
    upper += UNIT * 64, lower += UNIT * 64, chunk += UNIT;
  }
};

// The last units on their way arrive one after the other.
template <int PENDING>
DEVICE void arrive_all(Barrier* full, int& slot, int& left, int lane) {
  if constexpr (PENDING >= 0) {
    if (left > PENDING) {
      copy_async_wait<PENDING>();
      __syncwarp();
      if (lane == 0) arrive(full + slot);
      slot = slot + 1 == DEPTH ? 0 : slot + 1, left--;
    }
    arrive_all<PENDING - 1>(full, slot, left, lane);
  }
}

// AT_ONCE chunks of a warp's rows as tensor cores take them, and the scales of rows g and g + 8 where they are a group's.
struct Fragments {
  uint32 w[AT_ONCE * STEPS][4];
  float up, down;

  // From chunk `within` of a unit on, which is `chunk` of the row.
  DEVICE void load(const Words* stage, int within, int chunk, int lane) {
    if constexpr (F::BITS == 16) {
      const int row = lane % 8, place = lane / 8 % 2 * 32 + row * 4 + (lane / 16 ^ row / 2);
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
        for (int s = 0; s < 2; s++) load_matrices(w[k * 2 + s], stage + (within + k) * 64 + (place ^ s * 2));
    } else {
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) decode_chunk(w, k * STEPS, stage + (within + k) * 64 + lane);
    }
    if constexpr (W::GROUP > 0) {
      const int g = lane / 4, high = (g * GROUPS + (chunk >> SHIFT)) & 1;
      const uint32* both = (const uint32*)(stage + UNIT * 64) + within * 16;
      up = to_float(fp16{(uint16)(both[g] >> (16 * high))}), down = to_float(fp16{(uint16)(both[g + 8] >> (16 * high))});
    }
  }
};

#if END == CONV
constexpr int MIX = RANK + 2 * N, MIX_TILES = (MIX + 15) / 16, OWN_TILES = (MIX_TILES + SIDE - 1) / SIDE;
constexpr int CONVOLVERS = 32 * (SIDE - 2), OWN_PIECES = (NT * 64 + CONVOLVERS - 1) / CONVOLVERS;

// What stands behind in_proj, for 64 of its channels from `first` on, by the warps that don't multiply. What doesn't come
// from the step's kernels is asked for at once.
struct Behind {
  const T *window, *x_weight;
  T *next_window, *u, *z;
  float* found;
  int64 I, first, batch;
  Taps<T, 8, KC> taps;
  Window<T, 8, KC> windows[OWN_PIECES];

  DEVICE int thread() const { return (int)threadIdx.x - 32 * (WARPS + 2); }  // of those that convolve
  DEVICE int piece() const { return thread() % 8; }
  DEVICE int64 row(int k) const { return thread() / 8 + k * (CONVOLVERS / 8); }
  DEVICE int64 place(int k) const { return row(k) * I + first + piece() * 8; }

  DEVICE void load(const T* weight, const T* bias, const T* scale) {
    if (first >= I) return;
    for (int i = threadIdx.x - 32 * WARPS; i < MIX; i += 32 * SIDE) prefetch_line(x_weight + i * I + first);
    if (thread() >= 0) {
      taps.load(weight, bias, scale, first + piece() * 8);
#pragma unroll
      for (int k = 0; k < OWN_PIECES; k++)
        if (row(k) < batch) windows[k].load(window + place(k) * (KC - 1));
    }
  }
  // xs: the product's 8 NT rows of 72 numbers; ys: as fragments, 8 rows, 32 channels, lane.
  DEVICE void finish(const T (*xs)[72], Words* ys) {
    const bool gate = first >= I;
    if (thread() >= 0) {
#pragma unroll
      for (int k = 0; k < OWN_PIECES; k++) {
        const int64 m = row(k);
        if (m >= batch) break;
        const Words x = *(const Words*)&xs[m][piece() * 8];
        if (gate) {
          *(Words*)(z + place(k) - I) = x;
          continue;
        }
        float v[8];
        unpack<T>(v, x);
        const Vec<T, 8> y = windows[k].step(taps, v, next_window + place(k) * (KC - 1));
        store_vec<T, 8>(u + place(k), y);
        ys[m / 8 * 64 + piece() / 4 * 32 + m % 8 * 4 + piece() % 4] = *(const Words*)&y;
      }
    }
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, side = threadIdx.x / 32 - WARPS;
    Words w[OWN_TILES][2][2] = {};
    if (!gate) {
#pragma unroll
      for (int k = 0; k < OWN_TILES; k++)
  #pragma unroll
        for (int half = 0; half < 2; half++)
  #pragma unroll
          for (int j = 0; j < 2; j++) {
            const int r = (side + k * SIDE) * 16 + half * 8 + g;
            w[k][half][j] = r < MIX ? *(const Words*)(x_weight + r * I + first + j * 32 + t * 8) : Words{};
          }
    }
    __syncthreads();
    if (gate) return;
#pragma unroll
    for (int k = 0; k < OWN_TILES; k++) {
      const int r = (side + k * SIDE) * 16 + g;
      if (side + k * SIDE >= MIX_TILES) break;
      float* const to = found + first / 64 * batch * MIX + r;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float d[4] = {};
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const Words v = ys[n * 64 + j * 32 + lane];
#pragma unroll
          for (int s = 0; s < 2; s++) {
            const uint32 a4[4] = {w[k][0][j].at[2 * s], w[k][1][j].at[2 * s], w[k][0][j].at[2 * s + 1], w[k][1][j].at[2 * s + 1]};
            const uint32 b2[2] = {v.at[2 * s], v.at[2 * s + 1]};
            mma_16<T>(d, a4, b2);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int m = n * 8 + 2 * t + i % 2;
          if (m < batch && r + i / 2 * 8 < MIX) to[m * MIX + i / 2 * 8] = d[i];
        }
      }
    }
  }
};
#endif

// Grid: x SHARE rows (GATE: pairs) of W each, y slices; rows and SHARE are multiples of 8. x: (K, 8 NT) arranged.
// GATE: out (batch, rows), or with `tiles` arranged for a weight of `vectors` times fewer bits than 16. SUMS: found (slices,
// batch, rows) fp32. CONV: out u, found (I / 64, batch, MIX) fp32, SHARE 64, I a multiple of 64. Shared memory: XDEPTH X_STAGE
// bytes, then DEPTH units, STAGE words for each warp that has rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_stream(const unsigned char* weight, const unsigned char* second, const W::Scale* scales, const W::Scale* scales2,
              const char* x, T* out, const T* conv_weight, const T* conv_bias, const T* conv_scale, const T* x_weight,
              const T* window, T* next_window, T* z, float* found, int64 rows, int64 batch, int64 I,
              int64 tiles, int64 vectors) {
  extern __shared__ __align__(128) Words shared[];
  __shared__ Barrier full[XDEPTH], empty[XDEPTH], ready[TEAMS][DEPTH], free[TEAMS][DEPTH];
  let_next_begin();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64 begin = (int64)blockIdx.x * SHARE, end = begin + SHARE < rows ? begin + SHARE : rows;
  const int first = SLICE < CHUNKS ? (int)blockIdx.y * SLICE : 0, chunks = first + SLICE < CHUNKS ? first + SLICE : CHUNKS;
#if END == CONV
  T(*const xs)[72] = (T(*)[72])shared;
#endif
  if (threadIdx.x == 0) {
    for (int i = 0; i < XDEPTH; i++) make_barrier(full + i, 1), make_barrier(empty + i, WARPS);
    for (int i = 0; i < TEAMS * DEPTH; i++) make_barrier(ready[0] + i, 1), make_barrier(free[0] + i, 4);
    show_barriers();
  }
  __syncthreads();
  Words* const ring = shared + XDEPTH * X_STAGE / 16;  // unit, warp
  if (warp > WARPS && warp <= WARPS + TEAMS) {
    const int team = warp - WARPS - 1, rows_here = (int)(end - begin) - team * 4 * OWN;
    const int64 own = begin + team * 4 * OWN;
    Feed feed{weight + own * ROW + lane / 16 * ROW + lane % 16 * 16 + first * 64,
              (PAIRS ? second + own * ROW : weight + (own + 8) * ROW) + lane / 16 * ROW + lane % 16 * 16 + first * 64,
              (const fp16*)(PAIRS && lane % 16 >= 8 ? scales2 : scales) + (own + (PAIRS ? 0 : lane % 16 / 8 * 8) + lane % 8) * GROUPS,
              rows_here, first, chunks, lane % 16 / 4 * 64 + lane / 16 * 4, passing()};
    int slot = 0, oldest = 0, flying = 0;
    uint32 parity = 1;
#pragma unroll 1
    while (feed.chunk < chunks) {
      wait_for(free[team] + slot, parity);
      __syncwarp();
      feed.unit(ring + (slot * ACTIVE + team * 4) * STAGE, lane);
      if (++slot == DEPTH) slot = 0, parity ^= 1;
      if (++flying == FLIGHT) {
        copy_async_wait<FLIGHT - 1>();
        __syncwarp();
        if (lane == 0) arrive(ready[team] + oldest);
        oldest = oldest + 1 == DEPTH ? 0 : oldest + 1, flying--;
      }
    }
    arrive_all<FLIGHT - 2>(ready[team], oldest, flying, lane);
#if END != CONV
    return;
#endif
  }
  if (warp >= WARPS) {
#if END == CONV
    Behind behind{window, x_weight, next_window, out, z, found, I, begin, batch};
    behind.load(conv_weight, conv_bias, conv_scale);
#endif
    wait_for_previous();
    if (warp == WARPS && lane == 0) {
      int slot = 0;
      uint32 parity = 1;  // of the phase that must have ended: the first passes
      for (int chunk = first; chunk < chunks; chunk += AT_ONCE) {
        const int count = chunks - chunk < AT_ONCE ? chunks - chunk : AT_ONCE;
        wait_for(empty + slot, parity);
        copy_bulk((char*)shared + slot * X_STAGE, x + (int64)chunk * STEPS * PRODUCT, count * STEPS * PRODUCT, full + slot);
        if (++slot == XDEPTH) slot = 0, parity ^= 1;
      }
    }
    __syncwarp();
#if END == CONV
    __syncthreads();  // no one reads x any more
    __syncthreads();  // xs is there
    behind.finish(xs, shared + 64 * 72 * sizeof(T) / 16);
#endif
    return;
  }

  const int64 own = begin + warp * OWN, lower = PAIRS ? own : own + 8;
  const bool active = own < end, both = PAIRS ? active : lower < end;  // rows come in eights
  const int team = warp / 4;
  wait_for_previous();

  Words* const mine = ring + (warp < ACTIVE ? warp : team * 4) * STAGE;
  float sums[NT][4] = {};
  int slot = 0, unit_slot = 0;
  uint32 parity = 0, unit_parity = 0;
  Fragments fragments[BUFFERS];
  const auto load = [&](Fragments& to, int within, int chunk) { to.load(mine + unit_slot * ACTIVE * STAGE, within, chunk, lane); };
  const auto arrived = [&] {
    wait_for(ready[team] + unit_slot, unit_parity);
    __syncwarp();
  };
  const auto products = [&](Fragments& now, int chunk, float (&fresh)[NT][4]) {
    wait_for(full + slot, parity);
    __syncwarp();
    const Vectors from = described((const char*)shared + slot * X_STAGE);
    start(now.w);
#pragma unroll
    for (int q = 0; q < AT_ONCE * STEPS; q++) {
      const bool here = EVEN || chunk + q / STEPS < chunks;  // W is zero behind the end, x is not there
      if constexpr (W::GROUP > 0) product_16(fresh, now.w[q], behind(from, q * PRODUCT), q > 0);
      else product_16(sums, now.w[q], here ? behind(from, q * PRODUCT) : from, 1);
    }
    end_of_group();
  };
  const auto done = [&](const Fragments& now, float (&fresh)[NT][4]) {
    if constexpr (W::GROUP > 0) {
      finish(fresh);
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[n][i] += (i < 2 ? now.up : now.down) * fresh[n][i];
    } else {
      finish(sums);
    }
    __syncwarp();
    if (lane == 0) arrive(empty + slot);
    if (++slot == XDEPTH) slot = 0, parity ^= 1;
  };
  if constexpr (BUFFERS == 1) {
#pragma unroll 1
    for (int chunk = first; chunk < chunks; chunk += UNIT) {
      float fresh[NT][4];
      arrived();
      load(fragments[0], 0, chunk);
      products(fragments[0], chunk, fresh);
      done(fragments[0], fresh);
      if (lane == 0) arrive(free[team] + unit_slot);
      if (++unit_slot == DEPTH) unit_slot = 0, unit_parity ^= 1;
    }
  } else {
    arrived();
    load(fragments[0], 0, first);
#pragma unroll 1
    for (int unit = first; unit < chunks; unit += UNIT) {
#pragma unroll
      for (int k = 0; k < UNIT; k += AT_ONCE) {
        if (!EVEN && unit + k >= chunks) break;
        float fresh[NT][4];
        Fragments &now = fragments[k / AT_ONCE % 2], &next = fragments[(k / AT_ONCE + 1) % 2];
        products(now, unit + k, fresh);
        if (k + AT_ONCE < UNIT) {
          load(next, k + AT_ONCE, unit + k + AT_ONCE);
        } else {
          if (lane == 0) arrive(free[team] + unit_slot);  // what is multiplied now was read a product before
          if (++unit_slot == DEPTH) unit_slot = 0, unit_parity ^= 1;
          if (unit + UNIT < chunks) {
            arrived();
            load(next, 0, unit + UNIT);
          }
        }
        done(now, fresh);
      }
    }
  }

  const int g = lane / 4, t = lane % 4;
  float factor[2] = {1.0f, 1.0f};
  if constexpr (W::GROUP == 0 && F::BITS < 16) {
    if (active) factor[0] = to_float(scales[own + g]);
    if (active && both) factor[1] = to_float((PAIRS ? scales2 : scales)[lower + g]);
  }
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[n][i] *= factor[i / 2];
#if END == GATE
  if (active) {
    __syncwarp();
    T(*const made)[8] = (T(*)[8])mine;  // the ring's first unit: all have arrived, and only this warp reads them
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float gate = rounded<T>(sums[n][i]), up = rounded<T>(sums[n][i + 2]);
        made[n * 8 + 2 * t + i][g] = from_float<T>(gate * sigmoid(gate) * up);
      }
    __syncwarp();
    for (int64 m = lane; m < batch; m += 32) {
      const Words v = *(const Words*)made[m];
      if (tiles > 0) store_arranged((char*)out, v, m, (int)(own / 8), (int)tiles, (int)vectors);
      else *(Words*)(out + m * rows + own) = v;
    }
  }
#elif END == SUMS
  const int64 row = own + g;
  float* to = found + (blockIdx.y * batch + 2 * t) * rows + row;
#pragma unroll
  for (int n = 0; n < NT; n++, to += 8 * rows)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (n * 8 + 2 * t + i % 2 < batch && row + i / 2 * 8 < end) to[i % 2 * rows + i / 2 * 8] = sums[n][i];
#else
  __syncthreads();  // no one reads x any more
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) xs[n * 8 + 2 * t + i % 2][warp * 16 + g + i / 2 * 8] = from_float<T>(sums[n][i]);
  __syncthreads();
  __syncthreads();  // as those behind it
#endif
}
