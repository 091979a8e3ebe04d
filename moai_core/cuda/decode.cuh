// What the kernels of generation share beside products: RMSNorm of a row by a block of 256 threads. A row's bits are the
// same whichever kernel norms it.
#pragma once
#include "gemv.cuh"

// PIECE numbers at once, 16 bytes of the narrower type's.
template <class Number, int PIECE>
DEVICE void load_piece(float (&to)[PIECE], const Number* from) {
  constexpr int some = 16 / sizeof(Number) < PIECE ? 16 / sizeof(Number) : PIECE;
  static_assert(some * sizeof(Number) == 16, "16-byte loads");
#pragma unroll
  for (int i = 0; i < PIECE; i += some) {
    float part[some];
    unpack<Number>(part, load_fresh(from + i));
#pragma unroll
    for (int j = 0; j < some; j++) to[i + j] = part[j];
  }
}

// This thread's share of the sum of squares of a row of K numbers; its first PIECE numbers stay in `first`.
template <class Number, int PIECE>
DEVICE float squares(const Number* row, int64 K, float (&first)[PIECE]) {
  float sum = 0.0f;
  for (int64 at = (int64)threadIdx.x * PIECE; at < K; at += 256 * PIECE) {
    float v[PIECE];
    load_piece<Number, PIECE>(v, row + at);
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
      sum += v[i] * v[i];
      if (at == (int64)threadIdx.x * PIECE) first[i] = v[i];
    }
  }
  return sum;
}

// 1 / sqrt(mean + eps) from the sums of 8 warps.
DEVICE float rstd_of(const float* warps, int64 K, float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < 8; w++) sum += warps[w];
  return rsqrtf(sum / (float)K + eps);
}

// Number c of an embedding's row that begins at `row`, its scales and zero points at `index`; `group` columns share one.
template <class Format, class Number, class Scale>
DEVICE float embedded(const unsigned char* row, const Scale* scales, const fp16* zeros, int64 index, int64 c, int64 group) {
  float value;
  if constexpr (Format::BITS == 4) {
    const float code = (float)(row[c / 2] >> (c % 2 * 4) & 15);
    value = code - (zeros ? to_float(zeros[index + c / group]) : 8.0f);
  } else if constexpr (Format::BITS == 8) {
    value = (float)(signed char)row[c];
  } else {
    value = to_float(((const Number*)row)[c]);
  }
  if constexpr (Format::BITS < 16) value = rounded<Number>(value * to_float(scales[index + c / group]));
  return value;
}
