// moai: kernels decode_wide
// moai: macros T=bf16 NT=8 DEPTH=12 WEIGHT=Plain,float,0
// moai: macros T=bf16 NT=8 DEPTH=10 WEIGHT=Int4,fp16,128
// moai: macros T=fp16 NT=4 DEPTH=16 WEIGHT=Int8,fp16,0
// moai: macros T=bf16 NT=2 DEPTH=20 WEIGHT=Fp8,float,0
//
// Sums of W x for the rows of a wide batch (to 64), in generation: K is cut into slices that as many blocks share, so
// that a block keeps its part of all rows' x in shared memory and reads it once, while W comes by in tiles of 16 rows, a
// tile a warp, through a ring of the warp's own (as in decode_linear.cu). Weights are on their way before the previous
// kernel has ended. What is left are the slices' sums; the kernel behind adds them, in their order. A row's bits depend on
// the weight's shape alone.
//
//   T       type of x                  NT      tiles of 8 rows of x
//   DEPTH   stages of a warp's ring, even   WEIGHT  format, type of scales, columns that share one (0: a row, or none)
#include "decode.cuh"

constexpr int WARPS = 8, THREADS = 256, XV = F::XV, STEPS = F::COLUMNS / 4;
constexpr int TOGETHER = F::BITS == 16 ? 2 : 1;  // chunks at a time: one alone leaves tensor cores waiting
constexpr int STAGE = W::GROUP ? 68 : 64;  // words: rows g of each lane, rows g + 8, 16 rows' scales

struct Tiles {
  const unsigned char *weight, *second;  // second: more rows behind those of weight, or null
  const W::Scale *scales, *scales2;
  int64 row_bytes;
  int rows, groups, shift, tiles, begin, end, even, apart;  // rows, tiles: of each weight; chunks of the slice, a multiple
                                                            // of TOGETHER of them; from tile to tile
};

// A warp's next chunk of W.
struct Fetch {
  int tile, chunk, lane;
  bool has_upper, has_lower;
  const unsigned char *upper, *lower;
  const fp16* scales;
  int parity;

  DEVICE void begin(const Tiles& a) {
    chunk = a.begin;
    const bool other = tile >= a.tiles;
    const int g = lane / 4, row = (other ? tile - a.tiles : tile) * 16 + g;
    const bool any = tile < (a.second ? 2 : 1) * a.tiles;
    has_upper = any && row < a.rows, has_lower = any && row + 8 < a.rows;
    upper = (other && a.second ? a.second : a.weight) + row * a.row_bytes + (int64)chunk * 64 + lane % 4 * 16;
    lower = upper + 8 * a.row_bytes;
    if constexpr (W::GROUP > 0) {
      const int64 index = (int64)(row - g + lane % 16) * a.groups;
      scales = (const fp16*)(other && a.second ? a.scales2 : a.scales) + (index & ~1ll), parity = (int)(index & 1);
    }
  }
  DEVICE void stage(const Tiles& a, Words* to) {
    const bool here = chunk < a.end;
    copy_async_16(to + lane, upper, has_upper && here);
    copy_async_16(to + 32 + lane, lower, has_lower && here);
    if constexpr (W::GROUP > 0) {
      const bool mine = here && lane < 16 && tile < (a.second ? 2 : 1) * a.tiles && (tile >= a.tiles ? tile - a.tiles : tile) * 16 + lane < a.rows;
      if (mine) copy_async_4((uint32*)(to + 64) + lane, scales + ((parity + (chunk >> a.shift)) & ~1));
    }
    copy_async_commit();
    upper += 64, lower += 64;
    if (++chunk == a.even) tile += a.apart, begin(a);
  }
};

DEVICE void multiply(float (&sums)[NT][4], const Words* stage, const Words* xs, int groups, int group, int lane, bool here) {
  const int g = lane / 4;
  uint32 w[STEPS][4];
  const Words upper = stage[lane], lower = stage[32 + lane];
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    F::weights(w[s][0], w[s][2], upper, s);
    F::weights(w[s][1], w[s][3], lower, s);
  }
  float up = 1.0f, down = 1.0f;
  if constexpr (W::GROUP > 0) {
    const int high = (g * groups + group) & 1;  // 4 bytes hold two groups' scales
    const uint32* scales = (const uint32*)(stage + 64);
    up = here ? to_float(fp16{(uint16)(scales[g] >> (16 * high))}) : 0.0f;
    down = here ? to_float(fp16{(uint16)(scales[g + 8] >> (16 * high))}) : 0.0f;
  }
#pragma unroll
  for (int n = 0; n < NT; n++) {
    Words x[XV];
#pragma unroll
    for (int j = 0; j < XV; j++) x[j] = xs[(n * XV + j) * 32 + lane];
    float fresh[4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      uint32 v[2];
      F::vectors(v, x, s);
      if constexpr (W::GROUP == 0) mma_16<T>(sums[n], w[s], v);
      else mma_16<T>(fresh, w[s], v);
    }
    if constexpr (W::GROUP > 0)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[n][i] += (i < 2 ? up : down) * fresh[i];
  }
}

// Grid: slices times as many blocks as share a slice. x (batch, K); sums (slices, batch, rows of both weights) fp32. Shared
// memory: x's part, `slice` chunks of NT XV 512 bytes; 8 rings of DEPTH STAGE words.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_wide(const unsigned char* weight, const unsigned char* second, const W::Scale* scales, const W::Scale* scales2, const T* x,
            float* sums, int64 rows, int64 K, int64 row_bytes, int64 groups,
            int64 shift, int64 slices, int64 slice, int64 batch) {
  extern __shared__ __align__(128) Words shared[];
  let_next_begin();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int part = (int)(blockIdx.x % slices), share = (int)(blockIdx.x / slices), shares = (int)(gridDim.x / slices);
  const int chunks = (int)(row_bytes / 64), begin = part * (int)slice;
  const Tiles a{weight, second, scales, scales2, row_bytes, (int)rows, (int)groups, (int)shift, (int)((rows + 15) / 16), begin,
                begin + (int)slice < chunks ? begin + (int)slice : chunks,
                begin + ((begin + (int)slice < chunks ? (int)slice : chunks - begin) + TOGETHER - 1) / TOGETHER * TOGETHER, shares * WARPS};
  const int tiles = a.tiles * (second ? 2 : 1), steps = a.end - begin;
  Words* const ring = shared + slice * NT * XV * 32 + warp * DEPTH * STAGE;

  Fetch fetch;
  fetch.tile = share + shares * warp, fetch.lane = lane;
  fetch.begin(a);
  for (int d = 0; d < DEPTH - TOGETHER; d++) fetch.stage(a, ring + d * STAGE);

  wait_for_previous();
  const int pieces = steps * 4 * XV;  // of a row
  const auto place = [&](int row, int piece) {
    return ((piece / (4 * XV) * NT + row / 8) * XV + piece % XV) * 32 + row % 8 * 4 + piece / XV % 4;
  };
  for (int row = warp; row < NT * 8; row += WARPS)
#pragma unroll 4
    for (int piece = lane; piece < pieces; piece += 32)
      copy_async_16(shared + place(row, piece), x + row * K + ((int64)begin * 4 * XV + piece) * (16 / sizeof(T)), row < batch);
  copy_async_commit();
  copy_async_wait<0>();
  if constexpr (XV > 1)
    for (int row = warp; row < NT * 8; row += WARPS)
      for (int piece = lane; piece < pieces; piece += 32) {  // what this thread has copied itself
        Words* const to = shared + place(row, piece);
        *to = F::arranged(*to);
      }
  __syncthreads();

  int ready = 0;
  const int64 all = rows * (second ? 2 : 1);
  for (int tile = share + shares * warp; tile < tiles; tile += a.apart) {
    const bool other = tile >= a.tiles;
    const int row = (other ? tile - a.tiles : tile) * 16 + g;
    float factor[2] = {1.0f, 1.0f};
    if constexpr (W::GROUP == 0 && F::BITS < 16)
      for (int i = 0; i < 2; i++) factor[i] = row + 8 * i < rows ? to_float((other ? scales2 : scales)[row + 8 * i]) : 0.0f;
    float found[NT][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step += TOGETHER) {
      copy_async_wait<DEPTH - 2 * TOGETHER>();
      __syncwarp();
      Words* const free = ring + (ready == 0 ? DEPTH - TOGETHER : ready - TOGETHER) * STAGE;
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) fetch.stage(a, free + k * STAGE);
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        const bool here = step + k < steps;
        multiply(found, ring + (ready + k) * STAGE, shared + (here ? step + k : step) * NT * XV * 32, a.groups, (begin + step + k) >> a.shift, lane, here);
      }
      ready = ready + TOGETHER == DEPTH ? 0 : ready + TOGETHER;
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int m = n * 8 + 2 * t + i % 2, r = row + i / 2 * 8;
        if (m < batch && r < rows) sums[((int64)part * batch + m) * all + (other ? rows : 0) + r] = factor[i / 2] * found[n][i];
      }
  }
  copy_async_wait<0>();
}
