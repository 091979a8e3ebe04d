// What the kernels of generation share beside products: RMSNorm of a row by a block of 256 threads. A row's bits are the
// same whichever kernel norms it.
#pragma once
#include "gemv.cuh"

#ifdef WEIGHT
// The weight of the kernels for wide batches: format (gemv.cuh), type of scales, columns that share one (0: a row, or none).
template <template <class> class FORMAT, class S, int G>
struct Stored {
  using Format = FORMAT<T>;
  using Scale = S;
  static constexpr int GROUP = G;
};
using W = Stored<WEIGHT>;
using F = W::Format;
#endif

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

// ---- The convolution's step: `some` channels beside each other of a row, `width` taps.

template <class Number, int some, int width>
struct Taps {
  alignas(16) Number w[some * width];
  Vec<Number, some> add{}, times{};
  bool biased, scaled;

  // Of the channels from c on.
  DEVICE void load(const Number* weight, const Number* bias, const Number* scale, int64 c) {
#pragma unroll
    for (int i = 0; i < width; i++) *(Vec<Number, some>*)(w + i * some) = load_vec<Number, some>(weight + c * width + i * some);
    biased = bias, scaled = scale;
    if (bias) add = load_vec<Number, some>(bias + c);
    if (scale) times = load_vec<Number, some>(scale + c);
  }
};

// What the channels have read before.
template <class Number, int some, int width>
struct Window {
  alignas(16) Number past[some * (width - 1)];

  DEVICE void load(const Number* from) {
#pragma unroll
    for (int i = 0; i < width - 1; i++) *(Vec<Number, some>*)(past + i * some) = load_vec<Number, some>(from + i * some);
  }
  // What becomes of x; the window moves on, to `next`.
  DEVICE Vec<Number, some> step(const Taps<Number, some, width>& taps, const float (&x)[some], Number* next) {
    Vec<Number, some> y;
#pragma unroll
    for (int i = 0; i < some; i++) {
      float sum = taps.biased ? to_float(taps.add.at[i]) : 0.0f;
#pragma unroll
      for (int k = 0; k < width - 1; k++) {
        const Number before = past[i * (width - 1) + k];
        sum += to_float(taps.w[i * width + k]) * to_float(before);
        if (k > 0) past[i * (width - 1) + k - 1] = before;
      }
      past[i * (width - 1) + width - 2] = from_float<Number>(x[i]);
      sum += to_float(taps.w[i * width + width - 1]) * x[i];
      const float value = sum * sigmoid(sum);
      y.at[i] = from_float<Number>(taps.scaled ? rounded<Number>(value) * to_float(taps.times.at[i]) : value);
    }
#pragma unroll
    for (int i = 0; i < width - 1; i++) store_vec<Number, some>(next + i * some, *(Vec<Number, some>*)(past + i * some));
    return y;
  }
};

// ---- x (rows, K) of a wide batch as decode_stream.cu's tensor cores want it: of each 16 columns, in the order of k in which
// a weight of 16, 8 or 4 bits (`vectors` 1, 2, 4) meets them, for both halves and each 8 of 8 `tiles` rows 128 bytes.

// 8 numbers of 16 bits, which are piece `piece` of a row.
DEVICE void store_arranged(char* x, const Words& v, int64 row, int piece, int tiles, int vectors) {
  const int half = tiles * 128;
  char* const own = x + row / 8 * 128 + row % 8 * 16;
  if (vectors == 1) {
    *(Words*)(own + (int64)piece * half) = v;
    return;
  }
  Words y;
  if (vectors == 2) {
    transpose(y.at[0], y.at[1], v.at[0], v.at[1]), transpose(y.at[2], y.at[3], v.at[2], v.at[3]);
  } else {
    transpose(y.at[0], y.at[1], v.at[0], v.at[2]), transpose(y.at[2], y.at[3], v.at[1], v.at[3]);
  }
  const int p = piece % (4 * vectors);
  const int64 product = piece / (4 * vectors) * 2 * vectors + 2 * (p % vectors);
  char* const to = own + product * 2 * half + p / vectors * 4;
#pragma unroll
  for (int word = 0; word < 4; word++) *(uint32*)(to + word * half) = y.at[word];
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
