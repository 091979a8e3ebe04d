// moai: kernels quant_decode
// moai: macros T=bf16 WIDTH=4 GROUPS=1 ZEROS=0
// moai: macros T=bf16 WIDTH=8 GROUPS=0 ZEROS=0 | T=float WIDTH=4 GROUPS=4 ZEROS=1
// moai: macros T=fp16 WIDTH=4 GROUPS=0 ZEROS=1 | T=float WIDTH=8 GROUPS=2 ZEROS=0
//
// Integer matrices (quant.cuh) written out as numbers, for products of many rows and for gradients. A number is (q -
// zero) scale in fp32, rounded to T.
#include "quant.cuh"

constexpr int ROWS = 4;  // that a thread reads before it writes any

// 8 numbers of one group.
DEVICE Vec<T, 8> numbers(const Vec<uint32, WORDS>& words, float scale, float zero) {
  Vec<T, 8> y;
#pragma unroll
  for (int e = 0; e < 8; e += 2) {
    float v[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const uint32 q = words.at[e * WIDTH / 32] >> (e + j) * WIDTH % 32 & (WIDTH == 4 ? 15u : 255u);
      v[j] = WIDTH == 4 ? bits_float(0x4b000000u | q) - 8388608.0f  // 2^23 + q
                        : bits_float(0x4b000000u | (q ^ 128u)) - 8388736.0f;
      v[j] = (v[j] - zero) * scale;
    }
    const Vec<T, 2> pair = pair_from_floats<T>(v[0], v[1]);
    y.at[e] = pair.at[0], y.at[e + 1] = pair.at[1];
  }
  return y;
}

DEVICE void store_numbers(T* to, const Vec<T, 8>& y, int64 columns, bool aligned) {
  if (aligned) {
#pragma unroll
    for (int e = 0; e < 8; e += per_16_bytes<T>)
      *reinterpret_cast<Words*>(to + e) = reinterpret_cast<const Words*>(&y)[e / per_16_bytes<T>];
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (e < columns) to[e] = y.at[e];
  }
}

// out (O, K), dense. Grid: x, ROWS rows each; y, a thread for 8 columns. Rows of W are row_bytes apart.
extern "C" __global__ void __launch_bounds__(256)
    quant_decode(const unsigned char* __restrict__ weights, const fp16* __restrict__ scales, T* __restrict__ out,
                 int64 O, int64 K, int64 row_bytes, int64 units) {
  constexpr int kinds = 2 + 2 * ZEROS, many = GROUPS ? GROUPS : 1;
  const int64 column = 8 * ((int64)blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= K) return;
  Vec<uint32, WORDS> words[ROWS];
  float scale[ROWS], zero[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int64 o = min((int64)blockIdx.x * ROWS + r, O - 1), tile = o / TILE;
    words[r] = load_vec<uint32, WORDS>(reinterpret_cast<const uint32*>(weights + o * row_bytes + column * WIDTH / 8));
    const int64 group = GROUPS ? (tile * units + column / UNIT) * GROUPS + column % UNIT / (UNIT / many) : tile;
    const fp16* at = scales + (group * 8 + o % 8) * kinds + o % TILE / 8;
    scale[r] = to_float(at[0]), zero[r] = WIDTH == 4 ? 8.0f : 0.0f;
    if constexpr (ZEROS) zero[r] = to_float(at[2]);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int64 o = (int64)blockIdx.x * ROWS + r;
    if (o < O) store_numbers(out + o * K + column, numbers(words[r], scale[r], zero[r]), K - column, K % 8 == 0);
  }
}
