// What the products with few rows share beside gemv.cuh, whose integers are made into 16-bit numbers a pair at a time:
// exact, for an integer below 2^8 is a bf16 and an fp16.
#pragma once
#include "gemv.cuh"

// Two numbers as one word, a in the low half.
template <class Number>
DEVICE uint32 pair_bits(float a, float b) {
  const Vec<Number, 2> pair = pair_from_floats<Number>(a, b);
  return (uint32)pair.at[1].bits << 16 | pair.at[0].bits;
}

// x, which the compiler keeps from here on in place of computing it anew at each use.
DEVICE int kept(int x) {
#ifndef MOAI_HOST
  asm volatile("" : "+r"(x));
#endif
  return x;
}

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
