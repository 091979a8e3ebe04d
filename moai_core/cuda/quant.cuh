// Integer matrices W (O, K) as they are stored, row by row, and how a warp reads them: shared by the kernels quant_*.cu.
//
// A tile is 16 rows, a unit of it 128 columns. The scales lie in an order of their own (quant/cuda.py puts them there): a
// tile's unit has, for each of its GROUPS, those of rows g and g + 8 side by side for g = 0 .. 7, then the zero points.
//
// Of each 32 columns lane l (g = l / 4, t = l % 4) has the columns 8 t .. 8 t + 7 of rows g and g + 8: fragments A of two
// products m16n8k16, since a sum may take its terms in any order as long as x has the same. That order is the one in
// which integers come out of a word in pairs, and `arranged` puts x into it.
//
//   WIDTH    4: q - 8 (or a zero point), or 8: signed      GROUPS    scales of a row of a unit; 0: one for the whole row
//   ZEROS    scales come with zero points
#pragma once
#include "gemv.cuh"

constexpr int UNIT = 128, TILE = 16;
constexpr int UNIT_BYTES = UNIT * WIDTH / 8;  // of a row
constexpr int TILE_BYTES = TILE * UNIT_BYTES;
constexpr int SCALE_BYTES = GROUPS * 32 * (1 + ZEROS);
constexpr int PART_BYTES = TILE_BYTES + SCALE_BYTES;  // a tile's unit in shared memory
constexpr int HALVES = GROUPS > 0 ? 4 / GROUPS : 4;   // times 32 columns share a scale
constexpr int WORDS = WIDTH / 4;                      // of 32 columns of a row that a lane has
static_assert((WIDTH == 4 || WIDTH == 8) && (ZEROS == 0 || WIDTH == 4), "no such matrix");

// Two numbers as one word, a in the low half.
template <class Number>
DEVICE uint32 pair_bits(float a, float b) {
  const Vec<Number, 2> pair = pair_from_floats<Number>(a, b);
  return (uint32)pair.at[1].bits << 16 | pair.at[0].bits;
}

// ---- Integers as pairs of numbers, exact.

// The nibbles of a word, less 8, as numbers: pair i has those at bits 4 i and 16 + 4 i. A number whose exponent makes
// its last place 1 and whose last bits are an integer's is that plus a constant, which a multiply-add takes off.
template <class Number>
DEVICE void from_nibbles(uint32 word, uint32 (&a)[4]);
template <>
DEVICE void from_nibbles<bf16>(uint32 word, uint32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32 biased = masked_or(word >> 4 * i, 0x000f000fu, 0x43004300u);  // 128 + q
    a[i] = fma_pairs<bf16>(biased, 0x3f803f80u, 0xc308c308u);                   // - 136
  }
}
template <>
DEVICE void from_nibbles<fp16>(uint32 word, uint32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32 half = word >> 4 * i, low = masked_or(half, 0x000f000fu, 0x64006400u),
                 high = masked_or(half, 0x00f000f0u, 0x64006400u);
    a[i] = fma_pairs<fp16>(low, 0x3c003c00u, 0xe408e408u);       // 1024 + q - 1032
    a[i + 1] = fma_pairs<fp16>(high, 0x2c002c00u, 0xd480d480u);  // (1024 + 16 q) / 16 - 72
  }
}

// Fragments A of the two steps of 32 columns (`half`, of 4). at: the lane's first word of row g in a unit; from there it
// is HALF bytes to the next 32 columns, DOWN to row g + 8. codes: for x as Codes (gemv.cuh) has it.
template <class Number, int HALF, int DOWN, bool codes = false>
DEVICE void read_weights(const unsigned char* at, int half, uint32 (&a)[2][4]) {
#pragma unroll
  for (int second = 0; second < 2; second++) {
    const Vec<uint32, WORDS> words = *reinterpret_cast<const Vec<uint32, WORDS>*>(at + half * HALF + second * DOWN);
    if constexpr (WIDTH == 4) {
      uint32 pairs[4];
      if constexpr (codes) {
        Codes::weights(pairs[0], pairs[1], {{words.at[0]}}, 0);
        Codes::weights(pairs[2], pairs[3], {{words.at[0]}}, 1);
      } else {
        from_nibbles<Number>(words.at[0], pairs);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) a[i / 2][i % 2 * 2 + second] = pairs[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[i / 2][i % 2 * 2 + second] = Int8<Number>::pair(words.at[i / 2 % WORDS] >> 8 * (i % 2));
    }
  }
}

// The low halves of two words, their high ones, in one instruction each.
DEVICE uint32 low_halves(uint32 a, uint32 b) {
#ifdef MOAI_HOST
  return (a & 0xffffu) | b << 16;
#else
  return __byte_perm(a, b, 0x5410);
#endif
}
DEVICE uint32 high_halves(uint32 a, uint32 b) {
#ifdef MOAI_HOST
  return a >> 16 | (b & 0xffff0000u);
#else
  return __byte_perm(a, b, 0x7632);
#endif
}

// 8 numbers of x in the order of the fragments: two words for each step.
DEVICE Words arranged(const Words& x) {
  constexpr int apart = WIDTH == 4 ? 2 : 1;
  Words y;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32 a = x.at[WIDTH == 4 ? i : 2 * i], b = x.at[(WIDTH == 4 ? i : 2 * i) + apart];
    y.at[2 * i] = low_halves(a, b), y.at[2 * i + 1] = high_halves(a, b);
  }
  return y;
}
// Which of 8 numbers comes i-th.
DEVICE constexpr int arranged_at(int i) { return WIDTH == 4 ? i / 2 + i % 2 * 4 : i / 4 * 4 + i % 4 / 2 + i % 2 * 2; }

struct Scale {
  float scale[2], zero[2];  // of rows g and g + 8; the zero point less 8
};

DEVICE Scale read_scale(const unsigned char* at) {
  Scale s = {};
  const Vec<fp16, 2 + 2 * ZEROS> v = load_vec<fp16, 2 + 2 * ZEROS>(reinterpret_cast<const fp16*>(at));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    s.scale[i] = to_float(v.at[i]);
    if constexpr (ZEROS) s.zero[i] = to_float(v.at[2 + i]) - 8.0f;
  }
  return s;
}
