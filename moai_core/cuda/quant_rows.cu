// moai: kernels quantize_rows, norm_quantize, swiglu_quantize
// moai: macros R=bf16 X=bf16 W=bf16 SIZE=2048 V=8 TEAM=128 PER=2 | R=bf16 X=bf16 W=bf16 SIZE=5632 V=8 TEAM=352 PER=2
// moai: macros R=float X=bf16 W=bf16 SIZE=4096 V=8 TEAM=256 PER=2 | R=fp16 X=fp16 W=fp16 SIZE=48 V=1 TEAM=32 PER=2
// moai: macros R=float X=fp16 W=fp16 SIZE=16 V=4 TEAM=4 PER=1 | R=bf16 X=bf16 W=bf16 SIZE=32768 V=8 TEAM=1024 PER=4
//
// The inputs of an fp8 product: rows rounded to e4m3, each with a scale of its own, in the one pass that makes them.
//
//   scale = max(max |y| / 448, 1e-12);  code = e4m3(y * (1 / scale)), y rounded to its own type first
//
//   quantize_rows     y = x
//   norm_quantize     y = weight * total * rstd of total = residual + x, the bits of norm.cu
//   swiglu_quantize   y = silu(gate) * up, the bits of swiglu.cu
//
// A team of TEAM threads holds a row of SIZE values in registers, PER vectors of V a thread, as in norm.cu. NaN in a row
// makes all of it NaN.
//   R  the residual stream and its sum      X  x, gate, up      W  the norm's weight and y
#include "rows.cuh"

using uint8 = unsigned char;

// The largest over a team, the same in each of its threads; one barrier. Of the bits of magnitudes, which are ordered as
// the magnitudes are, NaN above all.
DEVICE uint32 team_max(uint32 x, uint32* scratch) {
#pragma unroll
  for (int other = (TEAM < 32 ? TEAM : 32) / 2; other > 0; other /= 2) {
    uint32 y = __shfl_xor_sync(0xffffffffu, x, other);
    x = x > y ? x : y;
  }
  if (TEAM <= 32) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int warp = 0; warp < TEAM / 32; warp++) x = x > scratch[warp] ? x : scratch[warp];
  return x;
}

// The nearest e4m3 numbers, ties to even; `a` comes first in memory. |x| < 464, or NaN.
DEVICE uint16 e4m3_pair(float a, float b) {
#if !defined(MOAI_HOST) && __CUDA_ARCH__ >= 890
  uint16 y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(b), "f"(a));
  return y;
#else
  uint32 both = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32 bits = float_bits(i ? b : a), sign = bits >> 31, code;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) code = 0x7f;
    // Below 2^-6 numbers are 2^-9 apart: the sum's last places are theirs.
    else if (bits < 121u << 23) code = float_bits(bits_float(bits) + 16384.0f) - float_bits(16384.0f);
    else code = (bits + 0x7ffff + (bits >> 20 & 1) - (120u << 23)) >> 20;
    both |= (sign << 7 | code) << 8 * i;
  }
  return (uint16)both;
#endif
}

// Rounds a team's row and writes it.
template <class T>
DEVICE void quantize(const Raw<T> (&y)[PER], uint8* __restrict__ codes, float* __restrict__ scales, int64 row, int lane,
                     bool real, uint32* scratch) {
  uint32 largest = 0;
#pragma unroll
  for (int i = 0; i < PER; i++)
#pragma unroll
    for (int j = 0; j < V; j++) {
      uint32 bits = float_bits(y[i].get(j)) & 0x7fffffff;
      largest = largest > bits ? largest : bits;
    }
  float scale = bits_float(team_max(largest, scratch)) * (1.0f / 448.0f);
  scale = scale < 1e-12f ? 1e-12f : scale;  // and NaN stays
  float inverse = 1.0f / scale;
  if (!real) return;
  if (lane == 0) scales[row] = scale;
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int column = (i * TEAM + lane) * V;
    Vec<uint8, V> code;
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      uint16 pair = e4m3_pair(y[i].get(j) * inverse, V > 1 ? y[i].get(j + (V > 1)) * inverse : 0.0f);
      code.at[j] = (uint8)pair;
      if (V > 1) code.at[j + (V > 1)] = (uint8)(pair >> 8);
    }
    if (in_row(column)) store_vec<uint8, V>(codes + row * SIZE + column, code);
  }
}

// x: rows `stride` values apart. codes (rows, SIZE), scales (rows).
extern "C" __global__ void __launch_bounds__(BLOCK)
quantize_rows(const X* __restrict__ x, uint8* __restrict__ codes, float* __restrict__ scales, int64 rows, int64 stride) {
  __shared__ uint32 scratch[32];
  int lane = threadIdx.x % TEAM;
  int64 row = (int64)blockIdx.x * TEAMS + threadIdx.x / TEAM;
  bool real = TEAMS == 1 || row < rows;
  Raw<X> y[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int column = (i * TEAM + lane) * V;
    y[i].load(x + row * stride + column, real && in_row(column));
  }
  quantize(y, codes, scales, row, lane, real, scratch);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
swiglu_quantize(const X* __restrict__ gate, const X* __restrict__ up, uint8* __restrict__ codes,
                float* __restrict__ scales, int64 rows) {
  __shared__ uint32 scratch[32];
  int lane = threadIdx.x % TEAM;
  int64 row = (int64)blockIdx.x * TEAMS + threadIdx.x / TEAM;
  bool real = TEAMS == 1 || row < rows;
  Raw<X> g[PER], u[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int column = (i * TEAM + lane) * V;
    g[i].load(gate + row * SIZE + column, real && in_row(column));
    u[i].load(up + row * SIZE + column, real && in_row(column));
  }
#pragma unroll
  for (int i = 0; i < PER; i++)
#pragma unroll
    for (int j = 0; j < V; j++) {
      float x = g[i].get(j);
      g[i].set(j, x * sigmoid(x) * u[i].get(j));
    }
  quantize(g, codes, scales, row, lane, real, scratch);
}

template <bool adds>
DEVICE void norm(const R* __restrict__ residual, const X* __restrict__ x, const W* __restrict__ weight,
                 R* __restrict__ total, uint8* __restrict__ codes, float* __restrict__ scales, int64 rows,
                 int64 residual_stride, int64 x_stride, float eps, float* sums, uint32* scratch) {
  int lane = threadIdx.x % TEAM;
  int64 row = (int64)blockIdx.x * TEAMS + threadIdx.x / TEAM;
  bool real = TEAMS == 1 || row < rows;
  Raw<R> sum[PER];
  Raw<W> w[PER];
  float scale = sum_row<adds>(sum, w, residual, x, weight, total, row, lane, real, residual_stride, x_stride, eps, sums);
#pragma unroll
  for (int i = 0; i < PER; i++)
#pragma unroll
    for (int j = 0; j < V; j++) w[i].set(j, sum[i].get(j) * scale * w[i].get(j));
  quantize(w, codes, scales, row, lane, real, scratch);
}

// Without x: of residual as it is, and no total is written. Strides in values, between rows.
extern "C" __global__ void __launch_bounds__(BLOCK)
norm_quantize(const R* residual, const X* x, const W* weight, R* total, uint8* codes, float* scales, int64 rows,
              int64 residual_stride, int64 x_stride, float eps) {
  __shared__ float sums[32];
  __shared__ uint32 scratch[32];
  if (x) norm<true>(residual, x, weight, total, codes, scales, rows, residual_stride, x_stride, eps, sums, scratch);
  else norm<false>(residual, x, weight, total, codes, scales, rows, residual_stride, x_stride, eps, sums, scratch);
}
