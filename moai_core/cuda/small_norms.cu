// moai: kernels small_norms_forward, small_norms_backward, small_norms_sum
// moai: macros X=bf16 W=bf16 V=8 PER=1 | X=bf16 W=float V=8 PER=2 | X=float W=float V=1 PER=4
//
// RMSNorm of three adjacent slices of each row, each with its own weight: dt, B and C of a Mamba mixer (Jamba's norms)
// in one launch, forward and backward. A warp holds one row in registers, PER vectors of V values a lane; no vector
// reaches over the edge of a slice.
//   X  the row      W  weights and results
#include "common.cuh"

constexpr int WARPS = 8;
constexpr int WIDTH = 32 * PER * V;  // columns that a warp can hold

// Where column c of the row lies: which slice, and its place there.
struct Place {
  int slice, column;
};

DEVICE Place place(int c, int size0, int size1) {
  if (c < size0) return {0, c};
  if (c < size0 + size1) return {1, c - size0};
  return {2, c - size0 - size1};
}

template <class P>
DEVICE P choose(int slice, P a, P b, P c) {
  return slice == 0 ? a : slice == 1 ? b : c;
}

// Three sums over the warp: lane sums `mine[i]` of vector i go to the slice that the vector lies in.
DEVICE void slice_sums(float (&sums)[3], const float (&mine)[PER], const Place (&at)[PER]) {
#pragma unroll
  for (int slice = 0; slice < 3; slice++) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) sum += at[i].slice == slice ? mine[i] : 0.0f;
    sums[slice] = warp_sum(sum);
  }
}

template <class T>
constexpr int part = V < per_16_bytes<T> ? V : per_16_bytes<T>;  // values a load

template <class T>
DEVICE void load_floats(float (&to)[V], const T* from, bool inside) {
#pragma unroll
  for (int i = 0; i < V; i += part<T>) {
    Vec<T, part<T>> v = inside ? load_vec<T, part<T>>(from + i) : Vec<T, part<T>>{};
#pragma unroll
    for (int j = 0; j < part<T>; j++) to[i + j] = to_float(v.at[j]);
  }
}

template <class T>
DEVICE void store_floats(T* to, const float (&from)[V]) {
#pragma unroll
  for (int i = 0; i < V; i += part<T>) {
    Vec<T, part<T>> v;
#pragma unroll
    for (int j = 0; j < part<T>; j++) v.at[j] = from_float<T>(from[i + j]);
    store_vec<T, part<T>>(to + i, v);
  }
}

// rstd (rows, 3). `stride`: values between two rows of x.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
small_norms_forward(const X* __restrict__ x, const W* __restrict__ weight0, const W* __restrict__ weight1,
                    const W* __restrict__ weight2, W* __restrict__ y0, W* __restrict__ y1, W* __restrict__ y2,
                    float* __restrict__ rstd, int64 rows, int64 size0, int64 size1, int64 size2, int64 stride,
                    float eps) {
  int lane = threadIdx.x % 32, size = (int)(size0 + size1 + size2);
  int64 row = (int64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp

  float value[PER][V], w[PER][V], squares[PER], sums[3], scale[3];
  Place at[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int c = (i * 32 + lane) * V;
    at[i] = place(c, (int)size0, (int)size1);
    load_floats<X>(value[i], x + row * stride + c, c < size);
    load_floats<W>(w[i], choose(at[i].slice, weight0, weight1, weight2) + at[i].column, c < size);
    squares[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < V; j++) squares[i] += value[i][j] * value[i][j];
  }
  slice_sums(sums, squares, at);
#pragma unroll
  for (int slice = 0; slice < 3; slice++) {
    scale[slice] = rsqrtf(sums[slice] * reciprocal_approx((float)choose(slice, size0, size1, size2)) + eps);
    if (lane == slice) rstd[row * 3 + slice] = scale[slice];
  }
#pragma unroll
  for (int i = 0; i < PER; i++) {
    float s = choose(at[i].slice, scale[0], scale[1], scale[2]);
#pragma unroll
    for (int j = 0; j < V; j++) value[i][j] *= s * w[i][j];
    W* y = choose(at[i].slice, y0, y1, y2) + row * choose(at[i].slice, size0, size1, size2) + at[i].column;
    if ((i * 32 + lane) * V < size) store_floats<W>(y, value[i]);
  }
}

// d_x (rows, sum of sizes) and, in partial[block], a block's share of the gradients of the three weights side by side.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
small_norms_backward(const W* __restrict__ d_y0, const W* __restrict__ d_y1, const W* __restrict__ d_y2,
                     const X* __restrict__ x, const W* __restrict__ weight0, const W* __restrict__ weight1,
                     const W* __restrict__ weight2, const float* __restrict__ rstd, X* __restrict__ d_x,
                     float* __restrict__ partial, int64 rows, int64 size0, int64 size1, int64 size2, int64 stride) {
  __shared__ float shares[WARPS][WIDTH];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = (int)(size0 + size1 + size2);
  float w[PER][V], d_weight[PER][V], inverse[3];
  Place at[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int c = (i * 32 + lane) * V;
    at[i] = place(c, (int)size0, (int)size1);
    load_floats<W>(w[i], choose(at[i].slice, weight0, weight1, weight2) + at[i].column, c < size);
#pragma unroll
    for (int j = 0; j < V; j++) d_weight[i][j] = 0.0f;
  }
#pragma unroll
  for (int slice = 0; slice < 3; slice++) inverse[slice] = reciprocal_approx((float)choose(slice, size0, size1, size2));

  for (int64 row = (int64)blockIdx.x * WARPS + warp; row < rows; row += (int64)gridDim.x * WARPS) {
    float n[PER][V], g[PER][V], both[PER], sums[3], scale[3];
#pragma unroll
    for (int slice = 0; slice < 3; slice++) scale[slice] = rstd[row * 3 + slice];
#pragma unroll
    for (int i = 0; i < PER; i++) {
      int c = (i * 32 + lane) * V;
      const W* d_y = choose(at[i].slice, d_y0, d_y1, d_y2);
      load_floats<X>(n[i], x + row * stride + c, c < size);
      load_floats<W>(g[i], d_y + row * choose(at[i].slice, size0, size1, size2) + at[i].column, c < size);
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
      float s = choose(at[i].slice, scale[0], scale[1], scale[2]);
      both[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < V; j++) {
        n[i][j] *= s;
        d_weight[i][j] += g[i][j] * n[i][j];
        g[i][j] *= w[i][j];
        both[i] += g[i][j] * n[i][j];
      }
    }
    slice_sums(sums, both, at);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      int c = (i * 32 + lane) * V, slice = at[i].slice;
      float s = choose(slice, scale[0], scale[1], scale[2]);
      float mean = choose(slice, sums[0] * inverse[0], sums[1] * inverse[1], sums[2] * inverse[2]);
#pragma unroll
      for (int j = 0; j < V; j++) g[i][j] = s * (g[i][j] - n[i][j] * mean);
      if (c < size) store_floats<X>(d_x + row * size + c, g[i]);
    }
  }

#pragma unroll
  for (int i = 0; i < PER; i++)
#pragma unroll
    for (int j = 0; j < V; j++) shares[warp][(i * 32 + lane) * V + j] = d_weight[i][j];
  __syncthreads();
  for (int c = threadIdx.x; c < size; c += 32 * WARPS) {
    float sum = 0.0f;
    for (int other = 0; other < WARPS; other++) sum += shares[other][c];
    partial[(int64)blockIdx.x * size + c] = sum;
  }
}

// Adds the `count` shares of each column in a fixed order. A block of 1024 threads takes 32 columns.
extern "C" __global__ void __launch_bounds__(1024)
small_norms_sum(const float* __restrict__ partial, W* __restrict__ d_weight0, W* __restrict__ d_weight1,
                W* __restrict__ d_weight2, int64 count, int64 size0, int64 size1, int64 size2) {
  __shared__ float sums[32][33];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = (int)(size0 + size1 + size2);
  int c = (int)blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (c < size)
#pragma unroll 4
    for (int64 row = warp; row < count; row += 32) sum += partial[row * size + c];
  sums[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(sums[lane][warp]);
  c = (int)blockIdx.x * 32 + warp;
  Place at = place(c, (int)size0, (int)size1);
  if (lane == 0 && c < size) choose(at.slice, d_weight0, d_weight1, d_weight2)[at.column] = from_float<W>(sum);
}
