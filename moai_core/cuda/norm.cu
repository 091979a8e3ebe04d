// moai: kernels norm_forward, norm_backward, norm_sum
// moai: macros R=bf16 X=bf16 W=bf16 Y=bf16 SIZE=2048 V=8 TEAM=128 PER=2
// moai: macros R=float X=bf16 W=bf16 Y=bf16 SIZE=4096 V=8 TEAM=256 PER=2
// moai: macros R=float X=bf16 W=float Y=bf16 SIZE=384 V=8 TEAM=64 PER=1
// moai: macros R=float X=float W=float Y=float SIZE=16 V=4 TEAM=4 PER=1
// moai: macros R=fp16 X=fp16 W=float Y=float SIZE=61 V=1 TEAM=32 PER=2
// moai: macros R=float X=float W=float Y=float SIZE=8000 V=4 TEAM=512 PER=4
// moai: macros R=bf16 X=bf16 W=bf16 Y=bf16 SIZE=16384 V=8 TEAM=512 PER=4
//
// RMSNorm over rows, alone or of the sum with the residual stream, forward and backward.
//
//   total = residual + x;  y = weight * total * rstd,  rstd = 1 / sqrt(mean(total^2) + eps)
//
// A team of TEAM threads holds a row of SIZE values in registers, PER vectors of V a thread, so that memory sees it once.
// Teams up to a warp stand side by side in a block of BLOCK threads; a larger team is a block of its own.
//   R  the residual stream and its sum      X  what is added to it      W  weight      Y  y and its gradient
#include "rows.cuh"

// Bytes of registers that a block's rows and weights take in the backward pass, of 256 KB; past that it reads them twice.
constexpr bool TIGHT = BLOCK * PER * V * (int)(2 * sizeof(R) + sizeof(W) + sizeof(Y) + 4) > 160 << 10;

template <bool adds>
DEVICE void forward(const R* __restrict__ residual, const X* __restrict__ x, const W* __restrict__ weight,
                    R* __restrict__ total, Y* __restrict__ y, float* __restrict__ rstd, int64 rows,
                    int64 residual_stride, int64 x_stride, float eps, float* scratch) {
  int lane = threadIdx.x % TEAM;
  int64 row = (int64)blockIdx.x * TEAMS + threadIdx.x / TEAM;
  bool real = TEAMS == 1 || row < rows;

  Raw<R> sum[PER];
  Raw<W> w[PER];
  float scale = sum_row<adds>(sum, w, residual, x, weight, total, row, lane, real, residual_stride, x_stride, eps, scratch);
  if (!real) return;
  if (lane == 0) rstd[row] = scale;
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int column = (i * TEAM + lane) * V;
    Raw<Y> out;
#pragma unroll
    for (int j = 0; j < V; j++) out.set(j, sum[i].get(j) * scale * w[i].get(j));
    if (in_row(column)) out.store(y + row * SIZE + column);
  }
}

// Without x: y of residual as it is, and no total is written. Strides in values, between rows.
extern "C" __global__ void __launch_bounds__(BLOCK)
norm_forward(const R* residual, const X* x, const W* weight, R* total, Y* y, float* rstd, int64 rows,
             int64 residual_stride, int64 x_stride, float eps) {
  __shared__ float scratch[32];
  if (x) forward<true>(residual, x, weight, total, y, rstd, rows, residual_stride, x_stride, eps, scratch);
  else forward<false>(residual, x, weight, total, y, rstd, rows, residual_stride, x_stride, eps, scratch);
}

// d = d_total + rstd * (g - n * mean(g * n)) with n = total * rstd, g = d_y * weight; d_weight = sum over rows d_y * n.
// d goes to d_residual and, where that has another dtype, to d_x; y is made again, with the bits of the forward pass. All of
// d_total, d_x and y may be null. A block walks over rows and leaves its share of d_weight in partial[block]; norm_sum adds
// the shares in a fixed order.
template <bool adds>
DEVICE void backward(const Y* __restrict__ d_y, const R* __restrict__ d_total, const R* __restrict__ total,
                     const W* __restrict__ weight, const float* __restrict__ rstd, R* __restrict__ d_residual,
                     X* __restrict__ d_x, Y* __restrict__ y, float* __restrict__ partial, int64 rows, int64 stride,
                     float (*scratch)[32], float* shares) {
  int lane = threadIdx.x % TEAM, team = threadIdx.x / TEAM, turn = 0;

  Raw<W> w[PER];
  float d_weight[PER][V];
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int column = (i * TEAM + lane) * V;
    w[i].load(weight + column, in_row(column));
#pragma unroll
    for (int j = 0; j < V; j++) d_weight[i][j] = 0.0f;
  }

  // Every thread of a block takes every turn: barriers and shuffles need them all.
  for (int64 first = (int64)blockIdx.x * TEAMS; first < rows; first += (int64)gridDim.x * TEAMS, turn ^= 1) {
    int64 row = first + team;
    bool real = TEAMS == 1 || row < rows;
    Raw<R> n[PER], d[PER];
    Raw<Y> g[PER];
    // Everything that vector i needs, `late`: again, or not before.
    auto read = [&](int i, bool late) {
      int column = (i * TEAM + lane) * V;
      bool inside = real && in_row(column);
      n[i].load(total + row * stride + column, inside);
      g[i].load(d_y + row * SIZE + column, inside);
      if (TIGHT) w[i].load(weight + column, in_row(column));
      if (late || !TIGHT) d[i].load(d_total + row * SIZE + column, adds && inside);
    };
    if (!TIGHT)
#pragma unroll
      for (int i = 0; i < PER; i++) read(i, false);
    float scale = real ? rstd[row] : 0.0f, both = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      if (TIGHT) read(i, false);
#pragma unroll
      for (int j = 0; j < V; j++) {
        float product = g[i].get(j) * (n[i].get(j) * scale);
        d_weight[i][j] += product;
        both += product * w[i].get(j);
      }
    }
    both = team_sum(both, scratch[turn]) * SHARE;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      int column = (i * TEAM + lane) * V;
      if (TIGHT) read(i, true);
      Raw<X> narrow;
#pragma unroll
      for (int j = 0; j < V; j++) {
        float sum = d[i].get(j) + scale * (g[i].get(j) * w[i].get(j) - n[i].get(j) * scale * both);
        d[i].set(j, sum);
        narrow.set(j, sum);
      }
      if (real && in_row(column)) {
        d[i].store(d_residual + row * SIZE + column);
        if (d_x) narrow.store(d_x + row * SIZE + column);
        if (y) {
          Raw<Y> again;
#pragma unroll
          for (int j = 0; j < V; j++) again.set(j, n[i].get(j) * scale * w[i].get(j));
          again.store(y + row * SIZE + column);
        }
      }
    }
  }

  float* share = TEAM > 32 ? partial + (int64)blockIdx.x * SIZE : shares + team * (TEAM * PER * V);
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int column = (i * TEAM + lane) * V;
#pragma unroll
    for (int j = 0; j < V; j++)
      if (TEAM <= 32 || in_row(column)) share[column + j] = d_weight[i][j];
  }
  if (TEAM > 32) return;
  __syncthreads();
  for (int column = threadIdx.x; column < SIZE; column += BLOCK) {
    float sum = 0.0f;
    for (int other = 0; other < TEAMS; other++) sum += shares[other * (TEAM * PER * V) + column];
    partial[(int64)blockIdx.x * SIZE + column] = sum;
  }
}

// At least 512 threads on a multiprocessor, for the grid is as large as what runs at once.
extern "C" __global__ void __launch_bounds__(BLOCK, (511 + BLOCK) / BLOCK)
norm_backward(const Y* d_y, const R* d_total, const R* total, const W* weight, const float* rstd, R* d_residual, X* d_x,
              Y* y, float* partial, int64 rows, int64 stride) {
  __shared__ float scratch[2][32];
  __shared__ float shares[TEAM > 32 ? 1 : BLOCK * PER * V];
  if (d_total)
    backward<true>(d_y, d_total, total, weight, rstd, d_residual, d_x, y, partial, rows, stride, scratch, shares);
  else
    backward<false>(d_y, d_total, total, weight, rstd, d_residual, d_x, y, partial, rows, stride, scratch, shares);
}

// d_weight[column] = the sum of `count` partial rows. A block of 1024 threads takes 32 columns.
extern "C" __global__ void __launch_bounds__(1024)
norm_sum(const float* __restrict__ partial, W* __restrict__ d_weight, int64 count) {
  __shared__ float sums[32][33];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64 column = (int64)blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (column < SIZE)
#pragma unroll 4
    for (int64 row = warp; row < count; row += 32) sum += partial[row * SIZE + column];
  sums[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(sums[lane][warp]);
  column = (int64)blockIdx.x * 32 + warp;
  if (lane == 0 && column < SIZE) d_weight[column] = from_float<W>(sum);
}
