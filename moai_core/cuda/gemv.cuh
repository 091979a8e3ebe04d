// Products of a matrix with few vectors (1 to 64), for generation: what a warp does with a tile of 16 rows of W.
//
// W (rows, columns) is read as it is stored, row by row, in chunks of 64 bytes: lane l, g = l / 4, t = l % 4, takes bytes
// 16t to 16t + 15 of rows g and g + 8. As a sum over k may go in any order, these are fragments A of tensor-core products
// m16n8k16, and the same k of 8 vectors x are fragments B. So no weight needs another order in memory, and the bits of a
// vector's result don't depend on how many others there are. fp32 weights take fused multiply-adds.
//
//   FORMAT   COLUMNS of 16 bytes   stored as
//   Plain    8 (fp32: 4)           numbers of type T
//   Int8     16                    signed bytes
//   Int4     32                    codes 0..15 in halves of bytes, the even column in the low one; stands for code - 8
//   Codes    32                    as Int4, scaled by groups of whole chunks, for few vectors: x in a form of its own
//   Fp8      16                    e4m3
//
// Also here: launches that begin before the previous kernel ends (programmatic dependent launch), loads of what that
// kernel wrote.
#pragma once
#include "common.cuh"

// ---- Kernels that begin early. A step is a chain of kernels 1, 2, 3, ..., of which the first begins when all work before
// it has ended. A later one, k, may begin as soon as every block of k - 1 has said `let_next_begin` or ended, so at a given
// time several kernels' blocks can be there. What makes that right:
//   - `wait_for_previous` returns when k - 1 has ended and what it wrote can be seen. A kernel has a block that waits in every
//     way through it, so k - 1 can't have ended before k - 2 had, and so on: behind its wait, a kernel runs alone but for
//     later ones that still wait. There it may read and write anything.
//   - Before it, a kernel reads only what no kernel of the step writes (weights, tables, and the states that the last step
//     left, for a step writes the other copy), writes nothing to memory, and so disturbs no one. The last step has ended:
//     the first kernel of this one began after it.
//     Where all blocks of k - 1 say `let_next_begin` behind their wait, what k - 2 and earlier ones wrote is there too.
//   - A block that waits holds registers and shared memory, but never those that an earlier kernel needs to go on: all of
//     k - 1's blocks have begun before one of k does.
//   - What another kernel of the step has written is read past the first cache (`load_fresh`, cp.async.cg): with kernels
//     side by side nobody empties that cache in between.

DEVICE void wait_for_previous() {
#if !defined(MOAI_HOST) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may begin where there is room, to read ahead; the sooner, the more of it they do.
DEVICE void let_next_begin() {
#if !defined(MOAI_HOST) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Brings a line from memory into the L2 cache; a hint.
DEVICE void prefetch_line(const void* from) {
#ifndef MOAI_HOST
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

// 16 bytes. Dynamic shared memory of them is __align__(128): else it begins behind a kernel's own variables, and at an odd
// multiple of 16 bytes bulk copies into it take longer (a step for one row 8 %).
using Words = Vec<uint32, 4>;

// What another multiprocessor has written a moment ago: past the first cache.
DEVICE Words load_fresh(const void* from) {
#ifdef MOAI_HOST
  return *reinterpret_cast<const Words*>(from);
#else
  Words w;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
               : "l"(from)
               : "memory");
  return w;
#endif
}

DEVICE float load_fresh_float(const float* from) {
#ifdef MOAI_HOST
  return *from;
#else
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
#endif
}

template <class Number>
DEVICE float load_fresh_number(const Number* from) {
  if constexpr (sizeof(Number) == 4) return load_fresh_float((const float*)from);
#ifdef MOAI_HOST
  return to_float(*from);
#else
  Number x;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(*reinterpret_cast<uint16*>(&x)) : "l"(from) : "memory");
  return to_float(x);
#endif
}

// 16 bytes of numbers, as fp32.
template <class Number>
DEVICE void unpack(float (&to)[16 / sizeof(Number)], const Words& from) {
  const Vec<Number, 16 / sizeof(Number)> v = *reinterpret_cast<const Vec<Number, 16 / sizeof(Number)>*>(&from);
#pragma unroll
  for (int i = 0; i < (int)(16 / sizeof(Number)); i++) to[i] = to_float(v.at[i]);
}

// As the model stores it between two operations.
template <class Number>
DEVICE float rounded(float x) {
  return to_float(from_float<Number>(x));
}

template <class Number>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

// ---- Tensor cores: d += a b, a (16, 16), b (16, 8), 16-bit numbers in pairs, fp32 sums. Fragments, as (row, column):
// a = {(g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)}, b = {(2t.., g), (2t + 8.., g)},
// d = {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.

#ifdef MOAI_HOST
void host_mma_bf16(float* d, const uint32* a, const uint32* b);
void host_mma_fp16(float* d, const uint32* a, const uint32* b);
#endif

template <class Number>
DEVICE void mma_16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
#ifdef MOAI_HOST
  if constexpr (is_bf16<Number>) host_mma_bf16(d, a, b);
  else host_mma_fp16(d, a, b);
#else
  if constexpr (is_bf16<Number>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// x y + z of pairs of 16-bit numbers, rounded once.
template <class Number>
DEVICE uint32 fma_pairs(uint32 x, uint32 y, uint32 z) {
#ifdef MOAI_HOST
  auto half = [](uint32 w, int i) {
    Number n;
    n.bits = (uint16)(w >> (16 * i));
    return to_float(n);
  };
  auto one = [&](int i) { return (uint32)from_float<Number>(half(x, i) * half(y, i) + half(z, i)).bits; };
  return one(0) | one(1) << 16;
#else
  uint32 w;
  if constexpr (is_bf16<Number>) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(w) : "r"(x), "r"(y), "r"(z));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(w) : "r"(x), "r"(y), "r"(z));
  return w;
#endif
}

// (x & mask) | bits, in one instruction: with two immediates it would be two.
DEVICE uint32 masked_or(uint32 x, uint32 mask, uint32 bits) {
#ifdef MOAI_HOST
  return (x & mask) | bits;
#else
  uint32 y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
#endif
}

// Numbers a, b of two words (a0, a1), (b0, b1) as (a0, b0), (a1, b1).
DEVICE void transpose(uint32& low, uint32& high, uint32 a, uint32 b) {
  low = (a & 0xffffu) | b << 16, high = a >> 16 | (b & 0xffff0000u);
}

// ---- Formats: from 16 bytes of a row to the words a[0] and a[2] (a[1] and a[3] for the row below) of step s of
// COLUMNS / 4, and to the words b of the same columns of x, of which XV vectors of 16 bytes, `arranged`, belong to 16
// bytes of W.

template <class Number>
struct Plain {
  static constexpr int COLUMNS = 16 / sizeof(Number), XV = 1, BITS = 8 * sizeof(Number);
  static DEVICE Words arranged(const Words& x) { return x; }
  static DEVICE void weights(uint32& low, uint32& high, const Words& w, int s) { low = w.at[2 * s], high = w.at[2 * s + 1]; }
  static DEVICE void vectors(uint32 (&b)[2], const Words (&x)[XV], int s) { b[0] = x[0].at[2 * s], b[1] = x[0].at[2 * s + 1]; }
};

// Bytes: a word's columns come out as the pairs (0, 2), (1, 3), and so must those of x.
template <class Number>
struct Bytes {
  static constexpr int COLUMNS = 16, XV = 2, BITS = 8;
  static DEVICE Words arranged(const Words& x) {
    Words y;
#pragma unroll
    for (int i = 0; i < 4; i += 2) transpose(y.at[i], y.at[i + 1], x.at[i], x.at[i + 1]);
    return y;
  }
  static DEVICE void vectors(uint32 (&b)[2], const Words (&x)[XV], int s) {
    b[0] = x[s / 2].at[s % 2 * 2], b[1] = x[s / 2].at[s % 2 * 2 + 1];
  }
};

template <class Number>
struct Int8 : Bytes<Number> {
  // bf16: seven bits fit behind 128, and the sign turns 128 into 256: byte = (128 + seven bits) - (128 + 128 sign).
  // fp16: 1024 + (byte + 128), less 1152.
  static DEVICE uint32 pair(uint32 word) {
    if constexpr (is_bf16<Number>)
      return fma_pairs<Number>(masked_or(word, 0x00800080u, 0x43004300u), 0xbf80bf80u, masked_or(word, 0x007f007fu, 0x43004300u));
    else return fma_pairs<Number>((word & 0x00ff00ffu) ^ 0x64806480u, 0x3c003c00u, 0xe480e480u);
  }
  static DEVICE void weights(uint32& low, uint32& high, const Words& w, int s) {
    low = pair(w.at[s]), high = pair(w.at[s] >> 8);
  }
};

template <class Number>
struct Fp8 : Bytes<Number> {
  // Exponent and mantissa at their places, times what the exponent's bias differs by: 2^120, in fp16 2^8.
  static DEVICE uint32 pair(uint32 word) {
    constexpr int shift = is_bf16<Number> ? 4 : 7;
    const uint32 bits = masked_or(word << 8, 0x80008000u, (word & 0x007f007fu) << shift);
    return fma_pairs<Number>(bits, is_bf16<Number> ? 0x7b807b80u : 0x5c005c00u, 0x80008000u);
  }
  static DEVICE void weights(uint32& low, uint32& high, const Words& w, int s) {
    low = pair(w.at[s]), high = pair(w.at[s] >> 8);
  }
};

// Halves of bytes: a word's columns come out as the pairs (0, 4), (1, 5), (2, 6), (3, 7), and so must those of x.
template <class Number>
struct Int4 {
  static constexpr int COLUMNS = 32, XV = 4, BITS = 4;
  // 128 (1024 in fp16), whose last mantissa bits count ones; less by 8 more.
  static DEVICE uint32 pair(uint32 word) {
    if constexpr (is_bf16<Number>)
      return fma_pairs<Number>(masked_or(word, 0x000f000fu, 0x43004300u), 0x3f803f80u, 0xc308c308u);
    else return fma_pairs<Number>(masked_or(word, 0x000f000fu, 0x64006400u), 0x3c003c00u, 0xe408e408u);
  }
  static DEVICE void weights(uint32& low, uint32& high, const Words& w, int s) {
    const uint32 word = w.at[s / 2] >> (s % 2 * 8);
    low = pair(word), high = pair(word >> 4);
  }
  static DEVICE Words arranged(const Words& x) {
    Words y;
#pragma unroll
    for (int i = 0; i < 2; i++) transpose(y.at[2 * i], y.at[2 * i + 1], x.at[i], x.at[i + 2]);
    return y;
  }
  static DEVICE void vectors(uint32 (&b)[2], const Words (&x)[XV], int s) {
    b[0] = x[s / 2].at[s % 2 * 2], b[1] = x[s / 2].at[s % 2 * 2 + 1];
  }
};

// Of a chunk of x, 8 numbers a lane, 16 lanes beside each other: the largest, without its sign, and the sum. All lanes call.
DEVICE void measure_chunk(const float (&v)[8], float& largest, float& sum) {
  largest = sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(v[i])), sum += v[i];
#pragma unroll
  for (int other = 8; other > 0; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
    sum += __shfl_xor_sync(0xffffffffu, sum, other);
  }
}

// The same bytes with hardly any work on them. At the bottom of an fp16 whose exponent is zero, a code is code 2^-24, four
// bits higher 16 times as much: so two of four codes need no shift, and none an addition. What makes up for it is done
// once for x: of each chunk of 128 columns, x becomes fp16 in units of a power of two, such that the largest lies between
// 2^14 and 2^15, odd columns a 16th; the products' sum counts in other units then, and has 8 times the sum of x too much.
// Exact but for numbers 2^-27 times as large as the chunk's largest.
struct Codes {
  static constexpr int COLUMNS = 32, XV = 4, BITS = 4;
  static DEVICE void weights(uint32& low, uint32& high, const Words& w, int s) {
    const uint32 word = w.at[s / 2] >> (s % 2 * 8);
    low = word & 0x000f000fu, high = word & 0x00f000f0u;
  }
  static DEVICE void vectors(uint32 (&b)[2], const Words (&x)[XV], int s) {
    b[0] = x[s / 2].at[s % 2 * 2], b[1] = x[s / 2].at[s % 2 * 2 + 1];
  }
  // 8 numbers of x: of a chunk, by 16 lanes beside each other; all lanes of a warp call. units: what a product's sum counts
  // in, what it has too much.
  template <class Number>
  static DEVICE Words arranged(const Words& x, Vec<float, 2>& units) {
    float v[8], largest, sum;
    unpack<Number>(v, x);
    measure_chunk(v, largest, sum);
    const uint32 bits = float_bits(largest) >> 23, exponent = bits > 14 ? bits : 14;
    const float times = bits_float((268 - exponent) << 23), odd = 0.0625f * times;  // 2^(14 + 127 - exponent)
    units = {{bits_float((exponent < 245 ? exponent + 10 : 255) << 23), 8.0f * sum}};  // 2^24 / times
    Words y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float factor = i % 2 ? odd : times;
      const Vec<fp16, 2> two = pair_from_floats<fp16>(v[i] * factor, v[i + 4] * factor);
      y.at[i] = *reinterpret_cast<const uint32*>(&two);
    }
    return y;
  }
};

// What a product of few 16-bit vectors takes for a format: scales of groups of whole chunks, no zero points.
template <class Format, class Number, bool codes>
struct Taken {
  using Type = Format;
};
template <class Number>
struct Taken<Int4<Number>, Number, true> {
  using Type = Codes;
};
template <class Format>
constexpr bool is_codes = false;
template <>
constexpr bool is_codes<Codes> = true;

template <class Format, class Number>
DEVICE void mma_of(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  if constexpr (is_codes<Format>) mma_16<fp16>(d, a, b);
  else mma_16<Number>(d, a, b);
}
