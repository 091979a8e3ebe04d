// int4 codes by integer products, for one vector: half of the instructions that Codes (gemv.cuh) takes, for masks make
// four bytes at once and tensor cores take 32 columns of them.
//
// Of each chunk of 128 columns x becomes whole numbers of 31 bits in units of a power of two, so that the largest lies
// between 2^29 and 2^30: exact for bf16 but below 2^-22 of the largest. Their four digits of 8 bits are four vectors of one
// product with the codes, of which those of even columns come as they are, and those of odd ones as 16 times themselves.
// Sums of a chunk are exact, and have 8 times the sum of x too much, for a code stands for code - 8.
#pragma once
#include "gemv.cuh"

#ifdef MOAI_HOST
void host_mma_bytes(int* d, const uint32* a, const uint32* b);
#endif

// d += a b, a (16, 32) unsigned bytes, b (32, 8) signed ones. Fragments, as (row, column): a = {(g, 4t..), (g + 8, 4t..),
// (g, 16 + 4t..), (g + 8, 16 + 4t..)}, b = {(4t.., g), (16 + 4t.., g)}, d as in mma_16 (PTX ISA 9.7.14.5.11).
DEVICE void mma_bytes(int (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
#ifdef MOAI_HOST
  host_mma_bytes(d, a, b);
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four of the bytes of low (0 to 3) and high (4 to 7): digit i of `which`, in base 16, says which is byte i.
DEVICE uint32 bytes_of(uint32 low, uint32 high, uint32 which) {
#ifdef MOAI_HOST
  uint32 found = 0;
  for (int i = 0; i < 4; i++) {
    const uint32 k = which >> (4 * i) & 7;
    found |= ((k < 4 ? low >> (8 * k) : high >> (8 * (k - 4))) & 255u) << (8 * i);
  }
  return found;
#else
  return __byte_perm(low, high, which);
#endif
}

template <class Number>
struct Digits {
  static constexpr int COLUMNS = 32, BITS = 4;
  static constexpr int XV = 2;      // words of 16 bytes of a chunk of x that a lane has: even columns', odd columns'
  static constexpr int APART = 16;  // of lane l: l % 16 and that many behind
  static constexpr int UNITS = 2;   // of lane t of 4: t % 2

  // Of a chunk of rows g and g + 8, 16 times the sums: by even lanes of the two upper digits, by odd ones of the two lower
  // ones, each in units of its own.
  static DEVICE void sums(int (&of)[2], const Words& upper, const Words& lower, const Words (&x)[XV]) {
    int d[2][4] = {};
#pragma unroll
    for (int odd = 0; odd < 2; odd++)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32 mask = odd ? 0xf0f0f0f0u : 0x0f0f0f0fu;
        const uint32 a[4] = {upper.at[i] & mask, lower.at[i] & mask, upper.at[i + 1] & mask, lower.at[i + 1] & mask};
        mma_bytes(d[odd], a, {x[odd].at[i], x[odd].at[i + 1]});
      }
#pragma unroll
    for (int i = 0; i < 2; i++)
      of[i] = (d[0][2 * i] * 256 + d[0][2 * i + 1]) * 16 + (d[1][2 * i] * 256 + d[1][2 * i + 1]);  // below 2^30
  }

  // Piece i of 16 of a chunk of x, 8 numbers, by 16 lanes beside each other; all lanes of a warp call, those that have none
  // with `there` false. units: what `sums` count in, what they have too much. What isn't finite in x is so in the latter.
  static DEVICE void put(Words* chunk, Vec<float, 2>* units, int i, const Words& x, bool there) {
    float v[8], largest, sum;
    unpack<Number>(v, x);
    measure_chunk(v, largest, sum);
    if (!there) return;
    const uint32 bits = float_bits(largest) >> 23, exponent = bits > 40 ? bits : 40;
    const float times = bits_float((283 - exponent) << 23);  // 2^(29 + 127 - exponent)
    uint32 y[8];  // bytes are digits: from -128 to 127, by a carry into the next
#pragma unroll
    for (int k = 0; k < 8; k++) y[k] = ((uint32)__float2int_rn(v[k] * times) + 0x00808080u) ^ 0x00808080u;
    uint32* const own = (uint32*)chunk + i;
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const uint32 *const z = y + odd, low[2] = {bytes_of(z[0], z[2], 0x5140), bytes_of(z[4], z[6], 0x5140)};
      const uint32 high[2] = {bytes_of(z[0], z[2], 0x7362), bytes_of(z[4], z[6], 0x7362)};
      uint32* const to = own + odd * (APART * 4);
      to[0] = bytes_of(high[0], high[1], 0x7632), to[16] = bytes_of(high[0], high[1], 0x5410);
      to[32] = bytes_of(low[0], low[1], 0x7632), to[48] = bytes_of(low[0], low[1], 0x5410);
    }
    if (i) return;
    units[0] = {{bits_float((exponent - 17) << 23), 8.0f * sum}};  // 2^16 / (16 times)
    units[1] = {{bits_float((exponent - 33) << 23), 0.0f}};
  }
};

template <class Format>
constexpr bool is_digits = false;
template <class Number>
constexpr bool is_digits<Digits<Number>> = true;
