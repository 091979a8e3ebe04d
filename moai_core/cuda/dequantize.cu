// moai: kernels dequantize
// moai: macros T=bf16 CODE=0 ZEROS=1 | T=bf16 CODE=1 ZEROS=0 | T=fp16 CODE=2 ZEROS=0 | T=float CODE=3 ZEROS=0
// moai: macros T=bf16 CODE=4 ZEROS=0 | T=float CODE=0 ZEROS=0
//
// A matrix as it is stored row by row to plain numbers: y = (code - zero) * scale, rounded once to T. A scale (and a
// zero) belongs to `group` times 8 neighbouring numbers.
//   CODE  0: int4, the even column in the low half; 1: int8; 2: e4m3; 3: e2m1, as int4; 4: nf4, the even column in the
//         high half
#include "common.cuh"

using uint8 = unsigned char;

constexpr int THREADS = 256, EACH = 4, BITS = CODE == 1 || CODE == 2 ? 8 : 4;

DEVICE float number(uint32 code, const float* table) {
  if (CODE == 0) return (float)(int)code;
  if (CODE == 1) return (float)(signed char)code;
  if (CODE == 2) {
    // The bits of an fp32 whose exponent is 120 too small, subnormal numbers among them.
    uint32 size = code & 0x7f;
    float x = size == 0x7f ? bits_float(0x7fc00000) : bits_float(size << 20) * bits_float((127u + 120u) << 23);
    return code & 0x80 ? -x : x;
  }
  return table[code];
}

// codes: 8 numbers in BITS bytes; n: how many times 8.
extern "C" __global__ void __launch_bounds__(THREADS)
dequantize(const uint8* __restrict__ codes, const float* __restrict__ scales, const float* __restrict__ zeros,
           T* __restrict__ y, int64 n, int64 group) {
  __shared__ float table[16];
  if (CODE > 2) {
    constexpr float E2M1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    constexpr float NF4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                               -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                               0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                               0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
    if (threadIdx.x < 16)
      table[threadIdx.x] = CODE == 4 ? NF4[threadIdx.x] : (threadIdx.x & 8 ? -1.0f : 1.0f) * E2M1[threadIdx.x & 7];
    __syncthreads();
  }
  int64 first = (int64)blockIdx.x * (THREADS * EACH) + threadIdx.x;
  Vec<uint8, BITS> q[EACH];
  float scale[EACH], zero[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int64 at = first + i * THREADS;
    if (at >= n) continue;
    // Below 2^32, so that the division is a short one.
    uint32 part = (uint32)at / (uint32)group;
    q[i] = load_vec<uint8, BITS>(codes + at * BITS);
    scale[i] = scales[part];
    zero[i] = ZEROS ? zeros[part] : CODE == 0 ? 8.0f : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int64 at = first + i * THREADS;
    if (at >= n) continue;
    Vec<T, 8> out;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      uint32 code = BITS == 8 ? q[i].at[j] : (q[i].at[j / 2] >> ((j % 2 == 0) == (CODE == 4) ? 4 : 0)) & 15;
      float x = number(code, table);
      out.at[j] = from_float<T>((CODE == 0 ? x - zero[i] : x) * scale[i]);
    }
    constexpr int V = per_16_bytes<T>;
#pragma unroll
    for (int j = 0; j < 8; j += V) {
      Vec<T, V> piece;
#pragma unroll
      for (int k = 0; k < V; k++) piece.at[k] = out.at[j + k];
      store_vec<T, V>(y + at * 8 + j, piece);
    }
  }
}
