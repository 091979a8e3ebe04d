// moai: kernels decode_wide_hopper
// moai: macros T=bf16 NT=8 DEPTH=4 UNIT=4 FLIGHT=2 STORE=0 WEIGHT=Plain,float,0
// moai: macros T=bf16 NT=8 DEPTH=3 UNIT=2 FLIGHT=3 STORE=0 WEIGHT=Int4,fp16,128
// moai: macros T=fp16 NT=4 DEPTH=4 UNIT=4 FLIGHT=2 STORE=1 WEIGHT=Int8,fp16,0
// moai: macros T=bf16 NT=2 DEPTH=4 UNIT=4 FLIGHT=2 STORE=0 WEIGHT=Fp8,float,0
//
// Sums of W x for the rows of a wide batch (2 to 64) on Hopper, as decode_wide.cu makes them elsewhere: K is cut into
// slices that as many blocks share, a block keeps its part of all rows' x in shared memory, and W comes by through rings.
// Here a tile has 64 rows of W and belongs to four warps, whose tensor cores read x from shared memory themselves
// (wgmma, PTX ISA 9.7.15): a product costs no instruction per row of the batch, which is what bounds the other kernel,
// twice over where W has four bits. W goes through registers, so every format of gemv.cuh is decoded on the way.
//
// Order of k. A product of 16 columns takes the columns 2t, 2t + 1, 2t + 8, 2t + 9 of W from lane t of 4. As W is read in
// pieces of 16 bytes, a lane's piece stands for all of its columns in several products, and x is laid out so that it
// meets them: product q has, for both halves of its columns and each 8 rows of x, 128 bytes: row r at 16 r, lane t at 4 t.
//
//   T       type of x, 16 bits              NT      tiles of 8 rows of x: 1, 2, 4 or 8
//   DEPTH   units of a warp's ring          FLIGHT  of them asked for before the previous kernel has ended
//   UNIT    chunks (64 bytes of a row) that come together: 2 or 4
//   WEIGHT  format, type of scales, columns that share one (0: a row, or none)
//   STORE   0: sums of slices; 1: W x itself, for the head, whose sums would be more than its weight: a block then has
//           all of K and brings one part of x after the other, while W goes on coming
#include "decode_hopper.cuh"

constexpr int WARPS = 8, THREADS = 256, TEAMS = 2, XV = F::XV, STEPS = F::COLUMNS / 4;
constexpr int AT_ONCE = F::BITS == 16 ? UNIT : F::BITS == 8 ? 2 : 1;  // chunks whose products are under way together
constexpr int STAGE = UNIT * (W::GROUP ? 68 : 64);                    // words of 16 bytes: chunks, then 16 rows' scales of each
constexpr int LINES = UNIT * 64 / 16;                                 // lanes that copy a row's part of a unit
constexpr int ROWS = 32 / LINES;                                      // rows of W that a warp copies at once
static_assert(UNIT % AT_ONCE == 0 && ROWS * LINES == 32, "a unit's rows");

// What this thread has stored in shared memory may be read by the tensor cores, after a barrier.
DEVICE void show_tensor_cores() {
#if !defined(MOAI_HOST) && defined(HAS_WGMMA)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- Rings

struct Slice {
  const unsigned char *weight, *second;  // second: more rows behind those of weight, or null
  const W::Scale *scales, *scales2;
  int64 row_bytes;
  int rows, groups, shift, tiles, begin, end, apart;  // rows, tiles of 64: of each weight; chunks; from tile to tile
};

// The next unit of W of a warp: of 16 rows, UNIT chunks. Lanes of one row copy neighbouring bytes.
struct Fetch {
  int tile, chunk, warp, lane, left;
  const unsigned char* from;
  unsigned long long policy;

  DEVICE void begin(const Slice& a) {
    chunk = a.begin;
    const bool other = tile >= a.tiles, any = tile < (a.second ? 2 : 1) * a.tiles;
    const int row = (other ? tile - a.tiles : tile) * 64 + warp % 4 * 16;
    left = any ? a.rows - row : 0;
    from = (other && a.second ? a.second : a.weight) + (row + lane / LINES) * a.row_bytes + (int64)chunk * 64 + lane % LINES * 16;
  }
  DEVICE void stage(const Slice& a, Words* to) {
    const bool here = chunk + lane % LINES / 4 < a.end;
    Words* const place = to + lane % LINES / 4 * 64 + lane / LINES * 4 + lane % 4;
    const int own = here ? left - lane / LINES : 0;
    const unsigned char* at = from;
#pragma unroll
    for (int i = 0; i < 16; i += ROWS) {
      copy_weight(place + i / 8 * 32 + i % 8 * 4, at, i < own, policy);
      at += ROWS * a.row_bytes;
    }
    if constexpr (W::GROUP > 0) {
      const bool other = tile >= a.tiles;
      const int own = lane % 16, row = (other ? tile - a.tiles : tile) * 64 + warp % 4 * 16 + own;
      const fp16* const scales = (const fp16*)(other && a.second ? a.scales2 : a.scales);
#pragma unroll
      for (int k = 0; k < UNIT; k += 2) {
        const int at = k + lane / 16;
        const int64 index = (int64)row * a.groups + ((chunk + at) >> a.shift);
        if (own < left && chunk + at < a.end) copy_async_4((uint32*)(to + UNIT * 64) + at * 16 + own, scales + (index & ~1ll));
      }
    }
    copy_async_commit();
    from += UNIT * 64, chunk += UNIT;
    if (chunk >= a.end) tile += a.apart, begin(a);
  }
};

// Adds AT_ONCE chunks' products to sums. x: those of the first of them.
DEVICE void multiply(float (&sums)[NT][4], const Words* stage, int first, const char* x, const Slice& a, int chunk, int lane) {
  const int g = lane / 4;
  uint32 w[AT_ONCE * STEPS][4];
#pragma unroll
  for (int k = 0; k < AT_ONCE; k++) decode_chunk(w, k * STEPS, stage + (first + k) * 64 + lane);
  if constexpr (W::GROUP == 0) {
    start(w);
#pragma unroll
    for (int q = 0; q < AT_ONCE * STEPS; q++) {
      const bool here = chunk + q / STEPS < a.end;  // W is zero behind the end, x is not there
      product_16(sums, w[q], described(here ? x + q * PRODUCT : x), 1);
    }
    end_of_group();
    finish(sums);
  } else {
    float fresh[NT][4];
    start(w);
#pragma unroll
    for (int q = 0; q < STEPS; q++) product_16(fresh, w[q], described(x + q * PRODUCT), q > 0);
    const int high = (g * a.groups + (chunk >> a.shift)) & 1;  // 4 bytes hold two groups' scales
    const uint32* scales = (const uint32*)(stage + UNIT * 64) + first * 16;
    const float up = to_float(fp16{(uint16)(scales[g] >> (16 * high))}), down = to_float(fp16{(uint16)(scales[g + 8] >> (16 * high))});
    end_of_group();
    finish(fresh);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[n][i] += (i < 2 ? up : down) * fresh[n][i];
  }
}

// This block's part of x, as tensor cores want it: many loads, then their stores.
DEVICE void place(char* to, const T* x, int64 K, int64 batch, int begin, int chunks, int warp, int lane) {
  constexpr int PIECES = 4 * XV, BATCH = 16 / XV;  // pieces of 16 bytes of a row and chunk; 8 rows of a chunk at a time
  const int t = lane % 4, own = lane / 4;
  // Lanes 0, 1 and 2, 3 read neighbours; of a long chunk they take different parts, or their stores met in the same banks.
  const auto piece = [&](int j) { return (XV == 4 ? (j + t / 2) % 4 : j) * 4 + t; };
#pragma unroll 1
  for (int first = warp; first < chunks * NT; first += WARPS * BATCH) {
    Words v[BATCH][XV];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int i = first + b * WARPS, row = i % NT * 8 + own;
      const T* const from = x + row * K + (int64)(begin + i / NT) * PIECES * 8;
#pragma unroll
      for (int j = 0; j < XV; j++) v[b][j] = i < chunks * NT && row < batch ? load_fresh(from + piece(j) * 8) : Words{};
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int i = first + b * WARPS;
      if (i >= chunks * NT) break;
#pragma unroll
      for (int j = 0; j < XV; j++) {
        const int p = piece(j);
        const Words mine = F::arranged(v[b][j]);
        char* const at = to + (i / NT * STEPS + 2 * (p % XV)) * PRODUCT + i % NT * 128 + own * 16 + p / XV * 4;
#pragma unroll
        for (int word = 0; word < 4; word++) *(uint32*)(at + word / 2 * PRODUCT + word % 2 * HALF) = mine.at[word];
      }
    }
  }
}

#if STORE
using Result = T;
#else
using Result = float;
#endif

// Grid: slices times as many blocks as share a slice. x (batch, K); out: sums (slices, batch, rows of both weights) fp32, or
// (batch, rows of both) of x's type. Shared memory: `slice` chunks of x, STEPS PRODUCT bytes each; 8 rings of DEPTH STAGE
// words.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_wide_hopper(const unsigned char* weight, const unsigned char* second, const W::Scale* scales, const W::Scale* scales2,
                   const T* x, Result* out, int64 rows, int64 K, int64 row_bytes, int64 groups, int64 shift, int64 slices,
                   int64 slice, int64 batch) {
  extern __shared__ __align__(128) Words shared[];
  let_next_begin();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / 4, g = lane / 4, t = lane % 4;
  const int part = STORE ? 0 : (int)(blockIdx.x % slices), shares = (int)(gridDim.x / (STORE ? 1 : slices));
  const int share = (int)(blockIdx.x / (STORE ? 1 : slices));
  const int chunks = (int)(row_bytes / 64), begin = part * (int)slice, last = begin + (int)slice;
  const Slice a{weight, second, scales, scales2, row_bytes, (int)rows, (int)groups, (int)shift, (int)((rows + 63) / 64), begin,
                STORE || last > chunks ? chunks : last, shares * TEAMS};
  const int tiles = a.tiles * (second ? 2 : 1);
  char* const kept = (char*)shared;
  Words* const ring = shared + slice * STEPS * PRODUCT / 16 + warp * DEPTH * STAGE;

  Fetch fetch;
  fetch.tile = share + shares * team, fetch.warp = warp, fetch.lane = lane, fetch.policy = passing();
  fetch.begin(a);
  // What is under way stands in front of what the previous kernels read: not the whole ring before they have ended.
  constexpr int EARLY = FLIGHT < DEPTH - 1 ? FLIGHT : DEPTH - 1;
  for (int d = 0; d < EARLY; d++) fetch.stage(a, ring + d * STAGE);

  wait_for_previous();
  const auto bring = [&](int from) { place(kept, x, K, batch, from, a.end - from < (int)slice ? a.end - from : (int)slice, warp, lane); };
  const auto meet = [&] {
    show_tensor_cores();
    __syncthreads();
  };
  if (!STORE) bring(begin);
  for (int d = EARLY; d < DEPTH - 1; d++) fetch.stage(a, ring + d * STAGE);
  if (!STORE) meet();

  int ready = 0;
  const int64 all = rows * (second ? 2 : 1);
  for (int both = share; both < tiles; both += a.apart) {
    const int tile = both + shares * team;
    if (!STORE && tile >= tiles) break;
    float found[NT][4] = {};
#pragma unroll 1
    for (int chunk = begin; chunk < a.end; chunk += UNIT) {
      const int at = STORE ? chunk % (int)slice : chunk - begin;
      if (STORE && at == 0) {
        __syncthreads();  // no one reads the last part any more
        bring(chunk);
        meet();
      }
      copy_async_wait<DEPTH - 2>();
      __syncwarp();
      fetch.stage(a, ring + (ready == 0 ? DEPTH - 1 : ready - 1) * STAGE);
#pragma unroll
      for (int k = 0; k < UNIT; k += AT_ONCE)
        if (k == 0 || chunk + k < a.end) multiply(found, ring + ready * STAGE, k, kept + (at + k) * STEPS * PRODUCT, a, chunk + k, lane);
      ready = ready + 1 == DEPTH ? 0 : ready + 1;
    }
    const bool other = tile >= a.tiles;
    const int row = (other ? tile - a.tiles : tile) * 64 + warp % 4 * 16 + g;
    const bool real = !STORE || tile < tiles;
    float factor[2] = {1.0f, 1.0f};
    if constexpr (W::GROUP == 0 && F::BITS < 16)
      for (int i = 0; i < 2; i++) factor[i] = real && row + 8 * i < rows ? to_float((other ? scales2 : scales)[row + 8 * i]) : 0.0f;
    Result* to = out + ((int64)part * batch + 2 * t) * all + (other ? rows : 0) + row;
#pragma unroll
    for (int n = 0; n < NT; n++, to += 8 * all)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (real && n * 8 + 2 * t + i % 2 < batch && row + i / 2 * 8 < rows) to[i % 2 * all + i / 2 * 8] = from_float<Result>(factor[i / 2] * found[n][i]);
  }
  copy_async_wait<0>();
}
