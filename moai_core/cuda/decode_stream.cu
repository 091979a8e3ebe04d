// moai: kernels decode_stream
// moai: macros T=bf16 NT=8 DEPTH=4 UNIT=4 XDEPTH=6 TEAMS=1 END=CONV N=16 RANK=128 KC=4 WEIGHT=Plain,float,0
// moai: macros T=bf16 NT=8 DEPTH=4 UNIT=4 XDEPTH=4 TEAMS=2 END=GATE N=16 RANK=128 KC=4 WEIGHT=Plain,float,0
// moai: macros T=bf16 NT=8 DEPTH=5 UNIT=4 XDEPTH=8 TEAMS=1 END=CONV N=16 RANK=128 KC=4 WEIGHT=Int4,fp16,128
// moai: macros T=bf16 NT=8 DEPTH=5 UNIT=4 XDEPTH=6 TEAMS=2 END=GATE N=16 RANK=128 KC=4 WEIGHT=Int4,fp16,128
// moai: macros T=fp16 NT=4 DEPTH=4 UNIT=4 XDEPTH=4 TEAMS=1 END=CONV N=64 RANK=64 KC=3 WEIGHT=Int4,fp16,128
// moai: macros T=fp16 NT=2 DEPTH=4 UNIT=4 XDEPTH=4 TEAMS=2 END=GATE N=8 RANK=32 KC=3 WEIGHT=Int8,fp16,0
//
// W x for the rows of a wide batch (9 to 64) on Hopper, with what stands behind it: a block has all of K for a few rows of
// W, so its sums are whole when it ends, and nothing has to be added up in memory. W comes through rings of each warp, x
// through one of the block, in the order in which tensor cores want it ("arranged", decode.cuh), by bulk copies that a warp
// of its own asks for. A tile has 64 rows of W and belongs to four warps (wgmma, PTX ISA 9.7.15: W from registers, so every
// format of gemv.cuh is decoded on the way, x from shared memory).
//
// Order of k. A product of 16 columns takes the columns 2t, 2t + 1, 2t + 8, 2t + 9 of W from lane t of 4. As W is read in
// pieces of 16 bytes, a lane's piece stands for all of its columns in several products, and x is laid out so that it
// meets them: product q has, for both halves of its columns and each 8 rows of x, 128 bytes: row r at 16 r, lane t at 4 t.
//
//   T       type of x, 16 bits              NT      tiles of 8 rows of x: 2, 4 or 8
//   DEPTH   units of a warp's ring          UNIT    chunks (64 bytes of a row) that come together: 4
//   XDEPTH  stages of x's ring, 8 products  TEAMS   tiles of a block
//   WEIGHT  format, type of scales, columns that share one (0: a row, or none)
//   END     GATE: y = silu(gate) up, with 8 rows of each in a warp; CONV: in_proj's, of whole tiles of u or z: the
//           convolution's step of width KC, and of each tile of u its share of x_proj (RANK + 2 N rows)
#include "decode_hopper.cuh"

#define GATE 1
#define CONV 2

constexpr int WARPS = 4 * TEAMS, SIDE = END == CONV ? 8 : 1;  // warps that multiply; one that brings x and others behind it
constexpr int THREADS = 32 * (WARPS + SIDE), STEPS = F::COLUMNS / 4;
constexpr int AT_ONCE = 8 / STEPS;                         // chunks whose products are under way together
constexpr int X_STAGE = 8 * PRODUCT;                       // bytes: AT_ONCE chunks
constexpr int STAGE = UNIT * (W::GROUP ? 68 : 64);         // words of 16 bytes: chunks, then 16 rows' scales of each
constexpr bool PAIRS = END == GATE;                        // a warp has 8 rows of both weights
constexpr int OWN = PAIRS ? 8 : 16;                        // rows (pairs) of a warp
static_assert(UNIT == 4 && UNIT % AT_ONCE == 0, "16 lanes copy a row's part of a unit");

// ---- Barriers of shared memory (PTX ISA 9.7.13.15): a phase ends when all have arrived and all bytes that were announced.

using Barrier = unsigned long long;
#ifdef MOAI_HOST
void host_yield();
struct HostBarrier {
  uint16 left, count;
  uint32 phase;
};
#define AT(barrier) ((HostBarrier*)(barrier))
#else
#define AT(barrier) "r"((uint32)__cvta_generic_to_shared(barrier))
#endif

DEVICE void make_barrier(Barrier* barrier, int count) {
#ifdef MOAI_HOST
  AT(barrier)->left = AT(barrier)->count = (uint16)count, AT(barrier)->phase = 0;
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::AT(barrier), "r"(count) : "memory");
#endif
}
// Behind all of them, before the block's barrier.
DEVICE void show_barriers() {
#if !defined(MOAI_HOST) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
DEVICE void arrive(Barrier* barrier) {
#ifdef MOAI_HOST
  if (--AT(barrier)->left == 0) AT(barrier)->left = AT(barrier)->count, AT(barrier)->phase ^= 1;
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::AT(barrier) : "memory");
#endif
}
// Until the phase of this parity has ended.
DEVICE void wait_for(Barrier* barrier, uint32 parity) {
#ifdef MOAI_HOST
  while (((volatile HostBarrier*)barrier)->phase == parity) host_yield();
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::AT(barrier),
      "r"(parity)
      : "memory");
#endif
}
// Bytes from global to shared memory, by the copy engine; the barrier's phase ends with their arrival.
DEVICE void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier) {
#ifdef MOAI_HOST
  __builtin_memcpy(shared, global, bytes);
  arrive(barrier);
#elif __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::AT(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::AT(shared), "l"(global),
               "r"(bytes), AT(barrier)
               : "memory");
#endif
}

// ---- Rings

struct Task {
  const unsigned char *upper, *lower;  // the first of a warp's rows g and g + 8
  const W::Scale *upper_scales, *lower_scales;
  int64 row_bytes;
  int left, left_lower, groups, shift, end;  // left: rows that there are, of 8; end: chunks
};

// The next unit of W of a warp: of 16 rows, UNIT chunks. Lanes of one row copy neighbouring bytes.
struct Fetch {
  int chunk, lane;
  unsigned long long policy;

  DEVICE void stage(const Task& a, Words* to) {
    if (chunk < a.end) {
      const bool here = chunk + lane % 16 / 4 < a.end;
      Words* const place = to + lane % 16 / 4 * 64 + lane / 16 * 4 + lane % 4;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int own = here ? (half ? a.left_lower : a.left) - lane / 16 : 0;
        const unsigned char* at = (half ? a.lower : a.upper) + lane / 16 * a.row_bytes + (int64)chunk * 64 + lane % 16 * 16;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          copy_weight(place + half * 32 + i * 4, at, i < own, policy);
          at += 2 * a.row_bytes;
        }
      }
      if constexpr (W::GROUP > 0) {
        const int own = lane % 8;
        const bool below = lane % 16 >= 8;
        const fp16* const scales = (const fp16*)(below ? a.lower_scales : a.upper_scales);
#pragma unroll
        for (int k = 0; k < UNIT; k += 2) {
          const int at = k + lane / 16;
          const int64 index = (int64)own * a.groups + ((chunk + at) >> a.shift);
          // 4 bytes hold two groups' scales; the address tells which is meant.
          if (own < (below ? a.left_lower : a.left) && chunk + at < a.end)
            copy_async_4((uint32*)(to + UNIT * 64) + at * 16 + lane % 16, (const void*)((unsigned long long)(scales + index) & ~3ull));
        }
      }
    }
    copy_async_commit();
    chunk += UNIT;
  }
};

// AT_ONCE chunks of a warp's rows as tensor cores take them, and the scales of rows g and g + 8 where they are a group's.
struct Fragments {
  uint32 w[AT_ONCE * STEPS][4];
  float up, down;

  // From chunk `first` of a unit on, which is `chunk` of the row.
  DEVICE void load(const Words* stage, int first, const Task& a, int chunk, int lane) {
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const Words upper = stage[(first + k) * 64 + lane], lower = stage[(first + k) * 64 + 32 + lane];
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        F::weights(w[k * STEPS + s][0], w[k * STEPS + s][2], upper, s);
        F::weights(w[k * STEPS + s][1], w[k * STEPS + s][3], lower, s);
      }
    }
    if constexpr (W::GROUP > 0) {
      const int g = lane / 4;
      const uint32* both = (const uint32*)(stage + UNIT * 64) + first * 16;
      const auto scale = [&](const W::Scale* rows, uint32 two) {
        const unsigned long long at = (unsigned long long)((const fp16*)rows + (int64)g * a.groups + (chunk >> a.shift));
        return to_float(fp16{(uint16)(two >> (8 * (at & 2)))});
      };
      up = scale(a.upper_scales, both[g]), down = scale(a.lower_scales, both[g + 8]);
    }
  }
};

#if END == CONV
constexpr int MIX = RANK + 2 * N, MIX_TILES = (MIX + 15) / 16, OWN_TILES = (MIX_TILES + SIDE - 1) / SIDE;
constexpr int CONVOLVERS = 32 * (SIDE - 1), OWN_PIECES = (NT * 64 + CONVOLVERS - 1) / CONVOLVERS;

// What stands behind in_proj, for 64 of its channels from `first` on, by the warps that don't multiply. What doesn't come
// from the step's kernels is asked for at once.
struct Behind {
  const T *window, *x_weight;
  T *next_window, *u, *z;
  float* found;
  int64 I, first, batch;
  Taps<T, 8, KC> taps;
  Window<T, 8, KC> windows[OWN_PIECES];

  DEVICE int thread() const { return (int)threadIdx.x - 32 * (WARPS + 1); }  // of those that convolve
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

// Grid: `share` rows (GATE: pairs) of W each. x: (K, 8 NT) arranged. GATE: out (batch, rows), a multiple of 8 as `share` is.
// CONV: out u, found (I / 64, batch, MIX) fp32, share 64, I a multiple of 64. Shared memory: XDEPTH X_STAGE bytes, then a ring
// of DEPTH STAGE words for each warp that has rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_stream(const unsigned char* weight, const unsigned char* second, const W::Scale* scales, const W::Scale* scales2,
              const char* x, T* out, const T* conv_weight, const T* conv_bias, const T* conv_scale, const T* x_weight,
              const T* window, T* next_window, T* z, float* found, int64 rows, int64 row_bytes, int64 groups, int64 shift,
              int64 batch, int64 share, int64 I) {
  extern __shared__ Words shared[];
  __shared__ Barrier full[XDEPTH], empty[XDEPTH];
  let_next_begin();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = (int)(row_bytes / 64);
  const int64 begin = blockIdx.x * share, end = begin + share < rows ? begin + share : rows;
#if END == CONV
  T(*const xs)[72] = (T(*)[72])shared;
#endif
  if (threadIdx.x == 0) {
    for (int i = 0; i < XDEPTH; i++) make_barrier(full + i, 1), make_barrier(empty + i, WARPS);
    show_barriers();
  }
  __syncthreads();
  if (warp >= WARPS) {
#if END == CONV
    Behind behind{window, x_weight, next_window, out, z, found, I, begin, batch};
    behind.load(conv_weight, conv_bias, conv_scale);
#endif
    wait_for_previous();
    if (warp == WARPS && lane == 0) {
      int slot = 0;
      uint32 parity = 1;  // of the phase that must have ended: the first passes
      for (int chunk = 0; chunk < chunks; chunk += AT_ONCE) {
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
  const auto rows_from = [&](int64 row) { return row >= end ? 0 : end - row < 8 ? (int)(end - row) : 8; };
  const Task a{weight + own * row_bytes, (PAIRS ? second : weight) + lower * row_bytes, scales + own * groups,
               (PAIRS ? scales2 : scales) + lower * groups, row_bytes, rows_from(own), rows_from(lower), (int)groups, (int)shift, chunks};
  const bool active = own < end;
  Words* const ring = shared + XDEPTH * X_STAGE / 16 + (active ? warp : 0) * DEPTH * STAGE;
  Fetch fetch{0, lane, passing()};
  if (active)
    for (int d = 0; d < DEPTH - 1; d++) fetch.stage(a, ring + d * STAGE);
  wait_for_previous();

  float sums[NT][4] = {};
  int ready = DEPTH - 1, slot = 0;
  uint32 parity = 0;
  Fragments even{}, odd{};
  const auto prepare = [&](Fragments& to, int chunk) {
    const int within = chunk % UNIT;
    if (!active) return;
    if (within == 0) {
      copy_async_wait<DEPTH - 2>();
      __syncwarp();
      fetch.stage(a, ring + ready * STAGE);
      ready = ready + 1 == DEPTH ? 0 : ready + 1;
    }
    to.load(ring + ready * STAGE, within, a, chunk, lane);
  };
  const auto multiply = [&](Fragments& now, Fragments& next, int chunk) {
    const char* const from = (const char*)shared + slot * X_STAGE;
    wait_for(full + slot, parity);
    __syncwarp();
    float fresh[NT][4];
    start(now.w);
#pragma unroll
    for (int q = 0; q < AT_ONCE * STEPS; q++) {
      const bool here = chunk + q / STEPS < chunks;  // W is zero behind the end, x is not there
      if constexpr (W::GROUP > 0) product_16(fresh, now.w[q], from + q * PRODUCT, q > 0);
      else product_16(sums, now.w[q], here ? from + q * PRODUCT : from, 1);
    }
    end_of_group();
    if (chunk + AT_ONCE < chunks) prepare(next, chunk + AT_ONCE);
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
  prepare(even, 0);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk += 2 * AT_ONCE) {
    multiply(even, odd, chunk);
    if (chunk + AT_ONCE < chunks) multiply(odd, even, chunk + AT_ONCE);
  }
  copy_async_wait<0>();

  const int g = lane / 4, t = lane % 4;
  float factor[2] = {1.0f, 1.0f};
  if constexpr (W::GROUP == 0 && F::BITS < 16) {
    factor[0] = g < a.left ? to_float(a.upper_scales[g]) : 0.0f;
    factor[1] = g < a.left_lower ? to_float(a.lower_scales[g]) : 0.0f;
  }
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[n][i] *= factor[i / 2];
#if END == GATE
  if (active) {
    T(*const made)[8] = (T(*)[8])ring;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float gate = rounded<T>(sums[n][i]), up = rounded<T>(sums[n][i + 2]);
        made[n * 8 + 2 * t + i][g] = from_float<T>(gate * sigmoid(gate) * up);
      }
    __syncwarp();
    for (int64 m = lane; m < batch; m += 32) *(Words*)(out + m * rows + own) = *(const Words*)made[m];
  }
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
