// moai: kernels scan_step; macros T=bf16 N=16 | T=float N=8 | T=fp16 N=32 | T=bf16 N=64 | T=float N=128
//
// The selective scan for one token a row, for generation: h' = exp(dt A) h + dt u B;  y = (C . h' + D u) silu(z),
// dt = softplus(raw dt + bias). Source: arXiv 2312.00752, algorithm 2.
//
// N / 4 neighbouring lanes share a channel, 4 states each, so that states and A move 16 bytes at a time and a warp
// reads 512 in a row. The states are nearly all there is to move; for large batches a thread keeps its A for several
// rows.
//
//   T  type of u, dt, z, B, C and y      N  states of a channel
#include "common.cuh"

static_assert(N % 4 == 0 && N >= 8 && N <= 128 && 32 % (N / 4) == 0, "whole channels in a warp");
constexpr int LANES = N / 4;
constexpr int THREADS = 128;

// Grid: x a thread for each (channel, 4 states), states fastest; y rows, taken in turns. `_row` is a tensor's stride
// between rows. D, z and dt_bias may be null; the states, A and y are contiguous.
extern "C" __global__ void __launch_bounds__(THREADS)
    scan_step(const T* __restrict__ u, const T* __restrict__ dt, const float* __restrict__ A, const T* __restrict__ B,
              const T* __restrict__ C, const float* __restrict__ D, const T* __restrict__ z,
              const float* __restrict__ dt_bias, const float* __restrict__ state, T* __restrict__ y,
              float* __restrict__ last, int64 batch, int64 I, int64 u_row, int64 dt_row, int64 z_row, int64 B_row,
              int64 C_row) {
  const int64 slot = (int64)blockIdx.x * THREADS + threadIdx.x;
  const int part = threadIdx.x % LANES;
  const bool mine = slot < I * LANES;
  const int64 c = mine ? slot / LANES : I - 1;  // all lanes of a warp take part in the sums

  Vec<float, 4> a = load_vec<float, 4>(A + c * N + part * 4);
#pragma unroll
  for (int j = 0; j < 4; ++j) a.at[j] *= LOG2E;
  const float bias = dt_bias ? dt_bias[c] : 0.0f, skip = D ? D[c] : 0.0f;

#pragma unroll 2
  for (int64 b = blockIdx.y; b < batch; b += gridDim.y) {
    const int64 at = (b * I + c) * N + part * 4;
    Vec<float, 4> h = load_vec<float, 4>(state + at);
    const float x = to_float(u[b * u_row + c]), step = softplus(to_float(dt[b * dt_row + c]) + bias);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float b_j = to_float(B[b * B_row + part * 4 + j]), c_j = to_float(C[b * C_row + part * 4 + j]);
      h.at[j] = exp2_approx(step * a.at[j]) * h.at[j] + step * x * b_j;
      sum += h.at[j] * c_j;
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (!mine) continue;
    store_vec<float, 4>(last + at, h);
    if (part > 0) continue;
    float out = sum + skip * x;
    if (z) {
      const float gate = to_float(z[b * z_row + c]);
      out *= gate * sigmoid(gate);
    }
    y[b * I + c] = from_float<T>(out);
  }
}
