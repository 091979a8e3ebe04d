// moai: kernels quant_decode, quant_gather; macros T=bf16 WIDTH=4 GROUPS=1 ZEROS=0 GLU=0
// moai: macros T=bf16 WIDTH=8 GROUPS=0 ZEROS=0 GLU=0 | T=float WIDTH=4 GROUPS=4 ZEROS=1 GLU=0
// moai: macros T=fp16 WIDTH=4 GROUPS=0 ZEROS=1 GLU=1 | T=float WIDTH=8 GROUPS=2 ZEROS=0 GLU=0
//
// Integer matrices in the order of quant_linear.cu, written out as numbers: all of one, for products of many rows, or
// single rows, for an embedding. A number is (q - zero) scale in fp32, rounded to T.
//
// The macros are those of quant_linear.cu.
#include "quant.cuh"

constexpr int UNIT = 128;
constexpr int TILE_BYTES = 16 * UNIT * WIDTH / 8;
constexpr int PART_BYTES = TILE_BYTES + GROUPS * 32 * (1 + ZEROS);
constexpr int VECTORS = TILE_BYTES / 512;  // a lane has so many 16-byte pieces of a unit
constexpr int TILE_OUT = GLU ? 8 : 16;
constexpr int EIGHT = 8;  // neighbouring columns that a lane has of a row


struct Scale {
  float scale, zero;
};

// Of row g (`second`: g + 8) of a tile, in a unit's `half` (of 4, 32 columns each). `part` is the unit's.
DEVICE Scale scale_of(const unsigned char* part, const fp16* whole, int64 tile, int half, int g, int second) {
  constexpr int width = 2 + 2 * ZEROS;
  const fp16* at = GROUPS == 0 ? whole + (tile * 8 + g) * width
                               : reinterpret_cast<const fp16*>(part + TILE_BYTES) + (half * GROUPS / 4 * 8 + g) * width;
  Scale s = {to_float(at[second]), WIDTH == 4 ? 8.0f : 0.0f};
  if constexpr (ZEROS) s.zero = to_float(at[2 + second]);
  return s;
}

// 8 columns of row g or g + 8 from the two words (of 4 bits) or four (of 8 bits) that a lane has of 32 columns.
DEVICE Vec<T, EIGHT> numbers(const uint32* words, int second, const Scale& s) {
  Vec<T, EIGHT> y;
#pragma unroll
  for (int e = 0; e < EIGHT; e += 2) {
    float v[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if constexpr (WIDTH == 4) {
        const uint32 q = words[e / 4] >> (16 * i + e / 2 % 2 * 8 + 4 * second) & 15u;
        v[i] = bits_float(0x4b000000u | q) - 8388608.0f;  // 2^23 + q
      } else {
        const uint32 q = words[e / 2] >> (16 * i + 8 * second) & 255u;
        v[i] = bits_float(0x4b000000u | (q ^ 128u)) - 8388736.0f;
      }
      v[i] = (v[i] - s.zero) * s.scale;
    }
    const Vec<T, 2> pair = pair_from_floats<T>(v[0], v[1]);
    y.at[e] = pair.at[0], y.at[e + 1] = pair.at[1];
  }
  return y;
}

DEVICE void store_numbers(T* to, const Vec<T, EIGHT>& y, int columns, bool whole) {
  constexpr int some = per_16_bytes<T>;
  if (whole) {
#pragma unroll
    for (int i = 0; i < EIGHT; i += some)
      *reinterpret_cast<Words*>(to + i) = reinterpret_cast<const Words*>(&y)[i / some];
  } else {
#pragma unroll
    for (int i = 0; i < EIGHT; i++)
      if (i < columns) to[i] = y.at[i];
  }
}

// out (O, K), dense. Grid: a warp for each unit of each tile, tile by tile. With GLU out is gate's rows, then up's.
extern "C" __global__ void __launch_bounds__(256)
    quant_decode(const unsigned char* __restrict__ weights, const fp16* __restrict__ scales, T* __restrict__ out,
                 int64 O, int64 K, int64 all_units, int64 parts) {
  const uint32 p = blockIdx.x * 8 + threadIdx.x / 32, units = (uint32)all_units;
  if (p >= parts) return;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64 tile = p / units, first = tile * TILE_OUT + g, column = p % units * UNIT + t * EIGHT;
  const unsigned char* part = weights + (int64)p * PART_BYTES;
  Words words[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; v++) words[v] = *reinterpret_cast<const Words*>(part + (v * 32 + lane) * 16);
  const bool whole = K % EIGHT == 0;
#pragma unroll
  for (int half = 0; half < 4; half++) {
    const int64 k = column + half * 32;
    if (k >= K) break;
#pragma unroll
    for (int second = 0; second < 2; second++) {
      const int64 o = first + second * (GLU ? O / 2 : 8);
      if (first >= (GLU ? O / 2 : O) || o >= O) continue;
      const uint32* mine = WIDTH == 4 ? words[half / 2].at + half % 2 * 2 : words[half].at;
      const Scale s = scale_of(part, scales, tile, half, g, second);
      store_numbers(out + o * K + k, numbers(mine, second, s), (int)min((int64)EIGHT, K - k), whole);
    }
  }
}

// Rows ids[0 .. n - 1] of a matrix of O rows to out (n, K), dense. Grid: a block a row. An id that is no row ends the
// program with an error, as it does in PyTorch.
extern "C" __global__ void __launch_bounds__(256)
    quant_gather(const unsigned char* __restrict__ weights, const fp16* __restrict__ scales,
                 const int64* __restrict__ ids, T* __restrict__ out, int64 O, int64 K, int64 units) {
  const int64 o = ids[blockIdx.x];
  if (o < 0 || o >= O) __trap();
  const int64 tile = o / 16;
  const int g = (int)(o % 8), second = (int)(o % 16 / 8);
  for (int64 k = threadIdx.x * EIGHT; k < K; k += 256 * EIGHT) {
    const int half = (int)(k % UNIT) / 32, lane = g * 4 + (int)(k % 32) / EIGHT;
    const unsigned char* part = weights + (tile * units + k / UNIT) * PART_BYTES;
    const Words words = *reinterpret_cast<const Words*>(part + ((WIDTH == 4 ? half / 2 : half) * 32 + lane) * 16);
    const Scale s = scale_of(part, scales, tile, half, g, second);
    const int first = WIDTH == 4 ? half % 2 * 2 : 0;
    const uint32 mine[4] = {words.at[first], words.at[first + 1], words.at[2], words.at[3]};
    store_numbers(out + blockIdx.x * K + k, numbers(mine, second, s), (int)min((int64)EIGHT, K - k), K % EIGHT == 0);
  }
}
