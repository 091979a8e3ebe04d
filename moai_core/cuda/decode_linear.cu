// moai: kernels decode_linear
// moai: macros T=bf16 R=bf16 FORMAT=Plain GROUP=0 ZEROS=0 S=float NT=1 RT=1 SLICES=1 SOURCE=1 RESULT=3 KC=4 DEPTH=6
// moai: macros T=bf16 R=float FORMAT=Int4 GROUP=128 ZEROS=0 S=fp16 NT=1 RT=1 SLICES=4 SOURCE=0 RESULT=1 KC=4 DEPTH=6
// moai: macros T=bf16 R=bf16 FORMAT=Plain GROUP=0 ZEROS=0 S=float NT=8 RT=4 SLICES=1 SOURCE=2 RESULT=2 KC=4 DEPTH=2
// moai: macros T=fp16 R=fp16 FORMAT=Int8 GROUP=0 ZEROS=0 S=fp16 NT=2 RT=2 SLICES=1 SOURCE=2 RESULT=0 KC=4 DEPTH=4
// moai: macros T=bf16 R=bf16 FORMAT=Int4 GROUP=32 ZEROS=1 S=fp16 NT=1 RT=1 SLICES=1 SOURCE=1 RESULT=2 KC=4 DEPTH=6
// moai: macros T=bf16 R=bf16 FORMAT=Fp8 GROUP=0 ZEROS=0 S=float NT=4 RT=2 SLICES=4 SOURCE=2 RESULT=4 KC=4 DEPTH=4
// moai: macros T=bf16 R=bf16 FORMAT=Int4 GROUP=128 ZEROS=0 S=fp16 NT=4 RT=2 SLICES=1 SOURCE=2 RESULT=2 KC=4 DEPTH=2
// moai: macros T=float R=float FORMAT=Plain GROUP=0 ZEROS=0 S=float NT=1 RT=1 SLICES=16 SOURCE=0 RESULT=4 KC=4 DEPTH=6
//
// out = W x for the rows of a batch that generates: one matrix product of the model's step for one token, with what
// stands before it and behind it. Reading W is nearly all there is to do.
//
// The 8 warps of a block share K: of a tile of 16 rows of W, warp w takes chunks w, w + 8, ... (gemv.cuh) and the sums
// are added in the order of the warps. Each lane reads ahead DEPTH chunks into its own places in shared memory, beyond
// the end of a tile and before the previous kernel has ended, so that memory is never idle and no barrier is needed but
// for the sum. Blocks take tiles in turns. K is cut into SLICES from the shape alone, whoever adds them: so a row of the
// batch has the same bits whatever stands beside it.
//
//   T       type of the arithmetic, x and norms          R       type of the residual stream
//   FORMAT  of W: Plain, Int8, Int4, Fp8                 GROUP   columns that share a scale; 0: scales are of whole rows
//   ZEROS   1: groups have zero points                   S       type of the scales
//   NT, RT  tiles of 8 rows of x, of 16 rows of W, at once
//   SOURCE  x: 0 as it is (few rows), 1 the RMSNorm of the residual stream (few rows), 2 as it is, through the ring
//   RESULT  0 out, 1 added to the residual stream, 2 silu(gate) up, 3 convolution step for the first half of the rows,
//           4 the slices' sums as they are, fp32
//   KC      width of the convolution
#include "decode.cuh"

constexpr int WARPS = 8, THREADS = 256;
constexpr bool TENSOR = sizeof(T) == 2;        // else fp32: multiply-adds
constexpr bool RING = SOURCE == 2, PAIRED = RESULT == 2, PARTIAL = RESULT == 4;
using Format = Taken<FORMAT<T>, T, TENSOR && !RING && !ZEROS && GROUP % 128 == 0 && (GROUP > 0)>::Type;
constexpr bool CODES = is_codes<Format>;
using Units = Vec<float, 2>;  // of a chunk of x (Codes)
constexpr int PER_UNIT = RING || PARTIAL ? 1 : SLICES;  // slices that one block adds
constexpr int XV = Format::XV, COLUMNS = Format::COLUMNS, CHUNK = 4 * COLUMNS;
constexpr int PIECES = 2 * RT + (RING ? NT * XV : 0);   // 16-byte pieces of a stage that a lane copies
constexpr int STEPS = COLUMNS / 4;                      // tensor-core products of a chunk
constexpr int PARTS = GROUP > 0 && GROUP < CHUNK ? CHUNK / GROUP : 1;
constexpr int SUMS = TENSOR ? 4 : 16;                   // of a lane, a tile
constexpr int TILE_ROWS = PAIRED ? 8 : 16;
constexpr int OUT = 128 * NT;                           // results of a tile: 16 rows of W by 8 NT rows of x
constexpr int PER_16 = 16 / sizeof(T);
static_assert(RT * NT * SUMS <= 128 && (RING || NT == 1), "sums stay in registers");
static_assert(!RING || SLICES == 1 || PARTIAL, "slices of a ring are added elsewhere");
static_assert(GROUP == 0 || GROUP % COLUMNS == 0, "a lane's columns have one scale");
static_assert(TENSOR || !RING, "fp32 takes few rows");

struct Arguments {
  const unsigned char *weight, *second;  // second: up, where gate is weight
  const S *scales, *scales2;
  const fp16 *zeros, *zeros2;
  int64 rows, K, row_bytes, groups, units;  // rows of each; groups: scales of a row
  int warp, lane, chunks, slice, steps;     // slice: chunks of one; steps: of a warp in it

  // Row of W (of gate or up, where PAIRED) that holds row 8 half + g of a tile.
  DEVICE int64 row(int64 tile, int half) const { return PAIRED ? tile * 8 + lane / 4 : tile * 16 + 8 * half + lane / 4; }
};

constexpr int UNITS_A_GROUP = SLICES / PER_UNIT;

// Where a warp is in its work: the block's unit, the slice in it, the step in that.
struct Walk {
  int64 unit, tile;   // tile: first of RT
  int slice, step;
  int first, count;   // the slice's first chunk of this warp; steps in which this lane's 16 bytes exist

  DEVICE void begin(const Arguments& a) {
    const int at = PER_UNIT == 1 ? (int)(unit % UNITS_A_GROUP) : slice, own = at * a.slice;
    const int64 end = (int64)(own + a.slice) * 64 < a.row_bytes ? (int64)(own + a.slice) * 64 : a.row_bytes;
    first = own + a.warp;
    count = unit < a.units ? (int)((end - (int64)first * 64 - a.lane % 4 * 16 + WARPS * 64 - 1) / (WARPS * 64)) : 0;
    tile = unit / UNITS_A_GROUP * RT;
    step = 0;
  }
  // Whether a slice begins.
  DEVICE bool next(const Arguments& a) {
    if (++step < a.steps) return false;
    if (++slice == PER_UNIT) slice = 0, unit += gridDim.x;
    begin(a);
    return true;
  }
  DEVICE int chunk() const { return first + step * WARPS; }
};

// What a lane reads next, of W and (RING) of x.
struct Fetch {
  Walk at;
  const unsigned char *upper, *lower;  // rows g and g + 8 of the first tile
  const T* column;                     // of x's row g
  int64 left;                          // rows of W from row g on

  DEVICE void begin(const Arguments& a, const T* x) {
    const int64 byte = (int64)at.first * 64 + a.lane % 4 * 16;
    upper = a.weight + a.row(at.tile, 0) * a.row_bytes + byte;
    lower = PAIRED ? a.second + a.row(at.tile, 1) * a.row_bytes + byte : upper + 8 * a.row_bytes;
    left = a.rows - a.row(at.tile, 0);
    if (RING) column = x + a.lane / 4 * a.K + (int64)at.first * CHUNK + a.lane % 4 * COLUMNS;
  }
  DEVICE void weights(const Arguments& a, Words* stage) const {
    const bool here = at.step < at.count;
#pragma unroll
    for (int i = 0; i < 2 * RT; i++) {
      const unsigned char* from = (i % 2 ? lower : upper) + i / 2 * (TILE_ROWS * a.row_bytes);
      copy_async_16(stage + i * 32, from, here && (PAIRED ? i / 2 * 8 : i * 8) < left);
    }
  }
  // The lane's own fragments of x, row 8 n + g.
  DEVICE void vectors(const Arguments& a, int64 batch, Words* stage) const {
    const bool here = at.step < at.count;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < XV; j++)
        copy_async_16(stage + (2 * RT + n * XV + j) * 32, column + n * 8 * a.K + j * PER_16,
                      here && n * 8 + a.lane / 4 < batch);
  }
  DEVICE void next(const Arguments& a, const T* x) {
    upper += WARPS * 64, lower += WARPS * 64;
    if (RING) column += WARPS * CHUNK;
    if (at.next(a)) begin(a, x);
  }
};

// ---- Scales of the lane's rows g and g + 8 of each tile, read one chunk before they are needed.

struct Scales {
  float scale[RT][2][PARTS], shift[RT][2][ZEROS ? PARTS : 1];
  DEVICE void load(const Arguments& a, const Walk& at) {
    if constexpr (GROUP > 0) {
      const bool here = at.chunk() < a.chunks && at.unit < a.units;
#pragma unroll
      for (int i = 0; i < 2 * RT; i++) {
        const int64 row = a.row(at.tile + i / 2, i % 2);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          const int64 group = ((int64)at.chunk() * CHUNK + part * (CHUNK / PARTS)) / (GROUP > 0 ? GROUP : 1);
          const bool valid = here && row < a.rows && group < a.groups;
          const int64 index = row * a.groups + group;
          scale[i / 2][i % 2][part] = valid ? to_float((PAIRED && i % 2 ? a.scales2 : a.scales)[index]) : 0.0f;
          if constexpr (ZEROS)
            shift[i / 2][i % 2][part] = valid ? to_float((PAIRED && i % 2 ? a.zeros2 : a.zeros)[index]) - 8.0f : 0.0f;
        }
      }
    }
  }
};

// ---- One chunk: sums += W x.

template <class F>
DEVICE Words arranged(const Words& x) {
  if constexpr (is_codes<F>) return x;
  else return F::arranged(x);
}

// Fragments of x of n-tile n: from the lane's part of the ring, or from xs, where all lanes find theirs.
DEVICE void read_vectors(Words (&x)[XV], const Words* stage, const Words* xs, int n, int chunk, int stride, int rows,
                         int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < XV; j++) {
    if constexpr (RING) x[j] = arranged<Format>(stage[(2 * RT + n * XV + j) * 32]);
    else x[j] = g < rows ? xs[(int64)g * stride + (chunk * XV + j) * 4 + t] : Words{};
  }
}

template <int count>  // SUMS: as a parameter, so that only one of the two ways is compiled
DEVICE void multiply(float (&sums)[RT][NT][count], const Arguments& a, const Scales& scales, const Words* stage,
                     const Words* xs, const Units* units, int chunk, int stride, int rows) {
  if constexpr (count == 4) {
    const int t = a.lane % 4;
    uint32 w[RT][STEPS][4];
#pragma unroll
    for (int r = 0; r < RT; r++) {
      const Words upper = stage[2 * r * 32], lower = stage[(2 * r + 1) * 32];
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        Format::weights(w[r][s][0], w[r][s][2], upper, s);
        Format::weights(w[r][s][1], w[r][s][3], lower, s);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      Words x[XV];
      read_vectors(x, stage, xs, n, chunk, stride, rows, a.lane);
      if constexpr (GROUP == 0) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          uint32 b[2];
          Format::vectors(b, x, s);
#pragma unroll
          for (int r = 0; r < RT; r++) mma_16<T>(sums[r][n], w[r][s], b);
        }
      } else {
        constexpr uint32 ONES = is_bf16<T> ? 0x3f803f80u : 0x3c003c00u;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          const bool mine = PARTS == 1 || t * PARTS / 4 == part;
          float sum[2][RT][4] = {}, total[4] = {};  // two chains of sums: one would make products wait for each other
#pragma unroll
          for (int s = 0; s < STEPS; s++) {
            uint32 b[2];
            Format::vectors(b, x, s);
            if (!mine) b[0] = b[1] = 0;
#pragma unroll
            for (int r = 0; r < RT; r++) mma_of<Format, T>(sum[s % 2][r], w[r][s], b);
            const uint32 ones[4] = {ONES, ONES, ONES, ONES};
            if constexpr (ZEROS) mma_16<T>(total, ones, b);
          }
#pragma unroll
          for (int r = 0; r < RT; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
              float both = sum[0][r][i] + sum[1][r][i];
              if constexpr (ZEROS) both -= scales.shift[r][i / 2][part] * total[i];
              if constexpr (CODES) {
                const int row = 2 * t + i % 2;
                const Units u = units[(row < rows ? row : 0) * a.chunks + chunk];
                both = both * u.at[0] - u.at[1];
              }
              sums[r][n][i] += scales.scale[r][i / 2][part] * both;
            }
        }
      }
    }
  } else {
    float w[RT][2][4];
#pragma unroll
    for (int i = 0; i < 2 * RT; i++) unpack<float>(w[i / 2][i % 2], stage[i * 32]);
#pragma unroll
    for (int m = 0; m < 8; m++) {
      if (m >= rows) continue;
      float x[4];
      unpack<float>(x, xs[(int64)m * stride + chunk * 4 + a.lane % 4]);
#pragma unroll
      for (int i = 0; i < 2 * RT; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) sums[i / 2][0][i % 2 * 8 + m] += w[i / 2][i % 2][k] * x[k];
    }
  }
}

// ---- Sums of the warps. In `red` a tile's result for row n of x and row r of W lies at n * APART + r.

constexpr int APART = 20;  // not 16: lanes write to 32 banks
constexpr int TILE_SUMS = 8 * NT * APART;

DEVICE void leave(float* red, float (&sums)[NT][SUMS], int lane) {
  const int g = lane / 4, t = lane % 4;
  if constexpr (TENSOR) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) red[(n * 8 + 2 * t + i % 2) * APART + g + i / 2 * 8] = sums[n][i];
  } else {
#pragma unroll
    for (int i = 0; i < 16; i++) {
      float sum = sums[0][i];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (i % 8 / 2 == t) red[i % 8 * APART + g + i / 8 * 8] = sum;
    }
  }
}

// red holds, for each slice, each warp's tiles.
template <int slices, int tiles>
DEVICE float add(const float* red, int tile, int at) {
  float total = 0.0f;
#pragma unroll
  for (int slice = 0; slice < slices; slice++) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += red[((slice * WARPS + warp) * tiles + tile) * TILE_SUMS + at];
    total += sum;
  }
  return total;
}

// ---- What becomes of a result

struct Results {
  void* out;
  R* residual;
  const T *conv_weight, *conv_bias, *conv_scale, *window;
  T *next_window, *z;
  int64 batch, of;  // rows here, and of the whole batch

  // W x for row n of x, row `row` of W; `up` beside it where PAIRED. slice: where PARTIAL.
  DEVICE void put(const Arguments& a, int64 n, int64 row, int slice, float value, float up) const {
    if (GROUP == 0 && FORMAT<T>::BITS < 16) {
      value *= to_float(a.scales[row]);
      if (PAIRED) up *= to_float(a.scales2[row]);
    }
    if constexpr (PARTIAL) {
      ((float*)out)[((int64)slice * of + n) * a.rows + row] = value;
      return;
    }
    value = rounded<T>(value);
    const int64 at = n * a.rows + row;
    if constexpr (RESULT == 1) {
      residual[at] = from_float<R>(load_fresh_number<R>(residual + at) + value);
    } else if constexpr (RESULT == 2) {
      ((T*)out)[at] = from_float<T>(value * sigmoid(value) * rounded<T>(up));
    } else if constexpr (RESULT == 3) {
      const int64 I = a.rows / 2, c = row < I ? row : row - I, place = n * I + c;
      if (row < I) ((T*)out)[place] = convolve(c, place, value);
      else z[place] = from_float<T>(value);
    } else {
      ((T*)out)[at] = from_float<T>(value);
    }
  }

  // The convolution's step for channel c: its window of the last KC - 1 inputs moves on, in other memory.
  DEVICE T convolve(int64 c, int64 place, float u) const {
    float sum = conv_bias ? to_float(conv_bias[c]) : 0.0f;
#pragma unroll
    for (int k = 0; k < KC - 1; k++) {
      const T past = window[place * (KC - 1) + k];
      sum += to_float(conv_weight[c * KC + k]) * to_float(past);
      if (k > 0) next_window[place * (KC - 1) + k - 1] = past;
    }
    next_window[place * (KC - 1) + KC - 2] = from_float<T>(u);
    sum += to_float(conv_weight[c * KC + KC - 1]) * u;
    const float y = sum * sigmoid(sum);
    return from_float<T>(conv_scale ? rounded<T>(y) * to_float(conv_scale[c]) : y);
  }

  // What `put` will read, on its way while the product is made.
  DEVICE void prepare(const Arguments& a, int64 n, int64 row) const {
    if (RESULT == 3 && n < batch && row < a.rows / 2) {
      prefetch_line(window + (n * (a.rows / 2) + row) * (KC - 1));
      if (n == 0) prefetch_line(conv_weight + row * KC);
    }
  }
};

// All results of tile `tile` of `tiles` in red, by all threads.
template <int slices, int tiles>
DEVICE void finish(const Arguments& a, const Results& results, const float* red, int tile, int64 first_row, int slice) {
  for (int e = threadIdx.x; e < OUT; e += THREADS) {
    const int n = e / 16, r = e % 16;
    const int64 row = first_row + r;
    if (n >= results.batch || row >= a.rows || r >= TILE_ROWS) continue;
    const float up = PAIRED ? add<slices, tiles>(red, tile, n * APART + r + 8) : 0.0f;
    results.put(a, n, row, slice, add<slices, tiles>(red, tile, n * APART + r), up);
  }
}

// ---- x for few rows, in shared memory: piece (chunk, t, j) of a row lies at (chunk XV + j) 4 + t.

// By all lanes of a warp, 16 of them beside each other for the pieces of a chunk (Codes); `there`: whether the lane has one.
template <class F>
DEVICE void put_piece(Words* xs, Units* units, int chunks, int stride, int64 m, int piece, const Words& w, bool there) {
  const int chunk = piece / (4 * XV), t = piece / XV % 4, j = piece % XV;
  Words& place = xs[m * stride + (chunk * XV + j) * 4 + t];
  if constexpr (is_codes<F>) {
    Units own;
    const Words y = F::template arranged<T>(w, own);
    if (there) place = y;
    if (there && piece % 16 == 0) units[m * chunks + chunk] = own;
  } else {
    if (there) place = F::arranged(w);
  }
}

// As it is, zeros behind K: `pieces` of each row from `first` on.
DEVICE void take_vectors(Words* xs, Units* units, int chunks, int stride, int first, int pieces, const T* x, int64 K, int64 batch) {
  for (int i = threadIdx.x; i - (int)threadIdx.x % 32 < batch * pieces; i += THREADS) {
    const bool there = i < batch * pieces;
    const int64 m = i / pieces, column = (int64)(first + i % pieces) * PER_16;
    const Words w = there && column < K ? load_fresh(x + m * K + column) : Words{};
    put_piece<Format>(xs, units, chunks, stride, m, first + i % pieces, w, there);
  }
}

// weight * row / rms(row), zeros behind K.
DEVICE void norm_vectors(Words* xs, Units* units, int chunks, int stride, int pieces, const R* residual, const T* weight, float* scratch, int64 K,
                         int64 batch, float eps) {
  float first[PER_16] = {}, unused[PER_16];
  for (int64 m = 0; m < batch; m++) {
    float sum = m == 0 ? squares<R, PER_16>(residual, K, first) : squares<R, PER_16>(residual + m * K, K, unused);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) scratch[m * WARPS + threadIdx.x / 32] = sum;
  }
  __syncthreads();
  for (int64 m = 0; m < batch; m++) {
    const float rstd = rstd_of(scratch + m * WARPS, K, eps);
    for (int piece = threadIdx.x; piece - (int)threadIdx.x % 32 < pieces; piece += THREADS) {
      const int64 column = (int64)piece * PER_16;
      Vec<T, PER_16> y = {};
      if (column < K) {
        float v[PER_16], w[PER_16];
        const Vec<T, PER_16> raw = load_vec<T, PER_16>(weight + column);
        if (m == 0 && piece == (int)threadIdx.x) {
#pragma unroll
          for (int i = 0; i < PER_16; i++) v[i] = first[i];
        } else {
          load_piece<R, PER_16>(v, residual + m * K + column);
        }
#pragma unroll
        for (int i = 0; i < PER_16; i++) w[i] = to_float(raw.at[i]), y.at[i] = from_float<T>(v[i] * rstd * w[i]);
      }
      put_piece<Format>(xs, units, chunks, stride, m, piece, *reinterpret_cast<const Words*>(&y), piece < pieces);
    }
  }
}

// Grid: any number of blocks. Shared memory: the ring, 8 DEPTH PIECES 512 bytes; x, batch * stride * 16 bytes (few rows);
// the sums. `of`: rows of the whole batch, where this is a part of it. May be null: `second`,
// scales, zeros and whatever RESULT doesn't use.
extern "C" __global__ void __launch_bounds__(THREADS, RING ? 1 : 2)
decode_linear(const unsigned char* weight, const unsigned char* second, const S* scales, const S* scales2,
              const fp16* zeros, const fp16* zeros2, const T* x, R* residual, const T* norm_weight, void* out,
              const T* conv_weight, const T* conv_bias, const T* conv_scale, const T* window, T* next_window, T* z,
              int64 rows, int64 K, int64 row_bytes, int64 groups,
              int64 batch, int64 of, float eps) {
  extern __shared__ __align__(128) Words shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunks = (int)((row_bytes + 63) / 64), slice = (chunks + SLICES - 1) / SLICES;
  const int steps = (slice + WARPS - 1) / WARPS, pieces = chunks * 4 * XV, stride = pieces % 8 ? pieces : pieces + 4;
  const int64 tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, units = (tiles + RT - 1) / RT * UNITS_A_GROUP;
  const Arguments a{weight, second, scales, scales2, zeros, zeros2, rows, K, row_bytes, groups, units,
                    warp, lane, chunks, slice, steps};
  const Results results{out, residual, conv_weight, conv_bias, conv_scale, window, next_window, z, batch, of};

  Words* const ring = shared + warp * DEPTH * PIECES * 32 + lane;
  Words* const xs = shared + WARPS * DEPTH * PIECES * 32;
  Units* const units_of = (Units*)(xs + (RING ? 0 : batch * stride));
  float* const red = (float*)(units_of + (CODES ? (batch * chunks + 1) / 2 * 2 : 0));
  __shared__ float scratch[8 * WARPS];

  Fetch fetch;
  fetch.at.unit = blockIdx.x, fetch.at.slice = 0;
  fetch.at.begin(a);
  fetch.begin(a, x);
  Walk take = fetch.at;
  Fetch again = fetch;
#pragma unroll
  for (int d = 0; d < DEPTH - 1; d++, fetch.next(a, x)) {
    fetch.weights(a, ring + d * PIECES * 32);
    if (!RING) copy_async_commit();
  }
  Scales next;
  next.load(a, take);

  wait_for_previous();
  let_next_begin();
  if constexpr (RING) {
#pragma unroll
    for (int d = 0; d < DEPTH - 1; d++, again.next(a, x)) {
      again.vectors(a, batch, ring + d * PIECES * 32);
      copy_async_commit();
    }
  } else {
    if constexpr (SOURCE == 1) norm_vectors(xs, units_of, chunks, stride, pieces, residual, norm_weight, scratch, K, batch, eps);
    else if (PER_UNIT == 1 && gridDim.x == units)  // one unit a block: one slice of x
      take_vectors(xs, units_of, chunks, stride, (int)(blockIdx.x % UNITS_A_GROUP) * slice * 4 * XV, slice * 4 * XV, x, K, batch);
    else take_vectors(xs, units_of, chunks, stride, 0, pieces, x, K, batch);
    __syncthreads();
  }

  int filled = DEPTH - 1, ready = 0, turn = 0;  // stages of the ring
  for (int64 unit = blockIdx.x; unit < units; unit += gridDim.x, turn ^= 1) {
    const int64 tile = unit / UNITS_A_GROUP * RT;
    for (int e = threadIdx.x; RESULT == 3 && e < RT * OUT; e += THREADS)
      results.prepare(a, e % OUT / 16, (tile + e / OUT) * 16 + e % 16);
    float sums[RT][NT][SUMS];
#pragma unroll 1
    for (int s = 0; s < PER_UNIT; s++) {
#pragma unroll
      for (int i = 0; i < RT * NT * SUMS; i++) sums[i / (NT * SUMS)][i / SUMS % NT][i % SUMS] = 0.0f;
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        fetch.weights(a, ring + filled * PIECES * 32);
        if constexpr (RING) fetch.vectors(a, batch, ring + filled * PIECES * 32);
        copy_async_commit();
        fetch.next(a, x);
        const int chunk = take.chunk();
        const bool here = chunk < chunks && chunk - take.first < a.slice - warp;
        const Scales now = next;
        take.next(a);
        next.load(a, take);
        copy_async_wait<DEPTH - 1>();
        if (here) multiply(sums, a, now, ring + ready * PIECES * 32, xs, units_of, chunk, stride, (int)batch);
        filled = filled + 1 == DEPTH ? 0 : filled + 1;
        ready = ready + 1 == DEPTH ? 0 : ready + 1;
      }
      if constexpr (!RING) {
        float* mine = red + ((turn * PER_UNIT + s) * WARPS + warp) * RT * TILE_SUMS;
#pragma unroll
        for (int r = 0; r < RT; r++) leave(mine + r * TILE_SUMS, sums[r], lane);
      }
    }
    const int part = (int)(unit % UNITS_A_GROUP);
    if constexpr (!RING) {
      // Two halves of `red` take turns, so that one barrier is enough.
      __syncthreads();
      for (int r = 0; r < RT; r++)
        finish<PER_UNIT, RT>(a, results, red + turn * PER_UNIT * WARPS * RT * TILE_SUMS, r, (tile + r) * TILE_ROWS, part);
    } else {
#pragma unroll
      for (int r = 0; r < RT; r++) {
        leave(red + warp * TILE_SUMS, sums[r], lane);
        __syncthreads();
        finish<1, 1>(a, results, red, 0, (tile + r) * TILE_ROWS, part);
        __syncthreads();
      }
    }
  }
  copy_async_wait<0>();
}
