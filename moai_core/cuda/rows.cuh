// Rows that a team of threads holds in registers, once through memory: shared by norm.cu and quant_rows.cu.
//
// A team of TEAM threads has a row of SIZE values, PER vectors of V a thread (rows.py). Teams up to a warp stand side by
// side in a block of BLOCK threads; a larger team is a block of its own.
//   R  the residual stream and its sum      X  what is added to it      W  the norm's weight
#pragma once
#include "common.cuh"

constexpr int BLOCK = TEAM > 32 ? TEAM : 128;
constexpr int TEAMS = BLOCK / TEAM;
constexpr float SHARE = 1.0f / SIZE;

// Rows that a team's vectors fill exactly need no test.
DEVICE bool in_row(int column) { return TEAM * PER * V == SIZE || column < SIZE; }

// V values as they lie in memory. Loading and widening are apart, so that all loads of a thread are under way at once.
template <class T>
struct Raw {
  static constexpr int n = V < per_16_bytes<T> ? V : per_16_bytes<T>;
  Vec<T, n> part[V / n];

  // Zeros where `inside` is false.
  DEVICE void load(const T* from, bool inside) {
#pragma unroll
    for (int i = 0; i < V / n; i++) part[i] = inside ? load_vec<T, n>(from + i * n) : Vec<T, n>{};
  }
  DEVICE void store(T* to) const {
#pragma unroll
    for (int i = 0; i < V / n; i++) store_vec<T, n>(to + i * n, part[i]);
  }
  DEVICE float get(int i) const { return to_float(part[i / n].at[i % n]); }
  DEVICE void set(int i, float x) { part[i / n].at[i % n] = from_float<T>(x); }
};

// The sum over a team, the same bits in each of its threads. Callers alternate between two `scratch`, so that one
// barrier a call is enough: nobody writes one of them again before all have read it.
DEVICE float team_sum(float x, float* scratch) {
#pragma unroll
  for (int other = (TEAM < 32 ? TEAM : 32) / 2; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  if (TEAM <= 32) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0f;
#pragma unroll
  for (int warp = 0; warp < TEAM / 32; warp++) x += scratch[warp];
  return x;
}

// The sum of a row of the residual stream and of x, which goes to `total` (without `adds` the row as it is), and the
// norm's weight; the result is what the norm scales the sum with, 1 / sqrt(mean(sum^2) + eps). Strides in values.
// `adds` is known to the compiler: a branch between the loads would make some wait for others.
template <bool adds>
DEVICE float sum_row(Raw<R> (&sum)[PER], Raw<W> (&w)[PER], const R* __restrict__ residual, const X* __restrict__ x,
                     const W* __restrict__ weight, R* __restrict__ total, int64 row, int lane, bool real,
                     int64 residual_stride, int64 x_stride, float eps, float* scratch) {
  Raw<X> added[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) {
    int column = (i * TEAM + lane) * V;
    bool inside = real && in_row(column);
    sum[i].load(residual + row * residual_stride + column, inside);
    if (adds) added[i].load(x + row * x_stride + column, inside);
    w[i].load(weight + column, in_row(column));
  }
  if (adds) {
    // The norm is that of the sum as it is stored, rounded.
#pragma unroll
    for (int i = 0; i < PER; i++) {
      int column = (i * TEAM + lane) * V;
#pragma unroll
      for (int j = 0; j < V; j++) sum[i].set(j, sum[i].get(j) + added[i].get(j));
      if (real && in_row(column)) sum[i].store(total + row * SIZE + column);
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < PER; i++)
#pragma unroll
    for (int j = 0; j < V; j++) squares += sum[i].get(j) * sum[i].get(j);
  return rsqrtf(team_sum(squares, scratch) * SHARE + eps);
}
