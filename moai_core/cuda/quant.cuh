// What kernels on integer matrices share: integers made into 16-bit numbers a pair at a time. That is exact: an integer
// below 2^8 is a bf16 and an fp16.
#pragma once
#include "gemv.cuh"

// ---- Two numbers of one type in 32 bits

// a b + c, rounded once: one instruction.
template <class Number>
DEVICE uint32 pair_fma(uint32 a, uint32 b, uint32 c);

#ifdef MOAI_HOST
template <class Number>
inline uint32 host_pair_fma(uint32 a, uint32 b, uint32 c) {
  uint32 d = 0;
  for (int i = 0; i < 32; i += 16) {
    const float x = to_float(Number{(uint16)(a >> i)}), y = to_float(Number{(uint16)(b >> i)}), z = to_float(Number{(uint16)(c >> i)});
    d |= (uint32)from_float<Number>(x * y + z).bits << i;
  }
  return d;
}
template <>
inline uint32 pair_fma<bf16>(uint32 a, uint32 b, uint32 c) {
  return host_pair_fma<bf16>(a, b, c);
}
template <>
inline uint32 pair_fma<fp16>(uint32 a, uint32 b, uint32 c) {
  return host_pair_fma<fp16>(a, b, c);
}
#else
template <>
DEVICE uint32 pair_fma<bf16>(uint32 a, uint32 b, uint32 c) {
  uint32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
DEVICE uint32 pair_fma<fp16>(uint32 a, uint32 b, uint32 c) {
  uint32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
#endif

// a + b for a pair of fp16 or bf16.
template <class Number>
DEVICE uint32 pair_bits(float a, float b) {
  const Vec<Number, 2> pair = pair_from_floats<Number>(a, b);
  return (uint32)pair.at[1].bits << 16 | pair.at[0].bits;
}

// ---- Integers as numbers of one type. A number whose exponent makes its last place 1 and whose last bits are the
// integer's is the integer plus a constant; one multiply-add takes the constant off.

// x, which the compiler keeps from here on in place of computing it anew at each use.
DEVICE int kept(int x) {
#ifndef MOAI_HOST
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The bits of `word` under a mask, and those of `rest`: the compiler would take two instructions for two constants.
DEVICE uint32 masked_or(uint32 word, uint32 mask, uint32 rest) {
#ifdef MOAI_HOST
  return (word & mask) | rest;
#else
  uint32 y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(word), "r"(mask), "r"(rest));
  return y;
#endif
}

// The nibbles of a word, less 8: pair i has those at bits 4 i and 16 + 4 i.
template <class Number>
DEVICE void from_nibbles(uint32 word, uint32 (&a)[4]);
template <>
DEVICE void from_nibbles<bf16>(uint32 word, uint32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32 biased = masked_or(word >> 4 * i, 0x000f000fu, 0x43004300u);  // 128 + q
    a[i] = pair_fma<bf16>(biased, 0x3f803f80u, 0xc308c308u);                   // - 136
  }
}
template <>
DEVICE void from_nibbles<fp16>(uint32 word, uint32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32 half = word >> 4 * i, low = masked_or(half, 0x000f000fu, 0x64006400u),
                 high = masked_or(half, 0x00f000f0u, 0x64006400u);
    a[i] = pair_fma<fp16>(low, 0x3c003c00u, 0xe408e408u);       // 1024 + q - 1032
    a[i + 1] = pair_fma<fp16>(high, 0x2c002c00u, 0xd480d480u);  // (1024 + 16 q) / 16 - 72
  }
}

// The signed bytes of a word: pair 0 has bytes 0 and 2, pair 1 bytes 1 and 3.
template <class Number>
DEVICE void from_bytes(uint32 word, uint32& a0, uint32& a1);
template <>
DEVICE void from_bytes<bf16>(uint32 word, uint32& a0, uint32& a1) {
  // 7 bits fit behind 128, the sign bit turns 128 into 256: q = (128 + low) - (128 + 128 sign)
  const uint32 odd = word >> 8, one = 0x43004300u, minus = 0xbf80bf80u;
  a0 = pair_fma<bf16>(masked_or(word, 0x00800080u, one), minus, masked_or(word, 0x007f007fu, one));
  a1 = pair_fma<bf16>(masked_or(odd, 0x00800080u, one), minus, masked_or(odd, 0x007f007fu, one));
}
template <>
DEVICE void from_bytes<fp16>(uint32 word, uint32& a0, uint32& a1) {
  // with the sign bit turned over a byte is q + 128
  const uint32 turned = word ^ 0x80808080u;
  a0 = pair_fma<fp16>(masked_or(turned, 0x00ff00ffu, 0x64006400u), 0x3c003c00u, 0xe480e480u);  // - 1152
  a1 = pair_fma<fp16>(masked_or(turned >> 8, 0x00ff00ffu, 0x64006400u), 0x3c003c00u, 0xe480e480u);
}
