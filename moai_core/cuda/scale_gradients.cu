// moai: kernels scale_gradients; macros T=bf16 TEAM=16 ZEROS=1 | T=float TEAM=4 ZEROS=0 | T=fp16 TEAM=32 ZEROS=1
//
// Gradients of the scales and zeros of an int4 matrix w = (q - zero) * scale from that of w, row by row as it is stored:
//
//   d_scale = sum of d_w (q - zero),  d_zero = -scale * sum of d_w,  over the group of 8 TEAM numbers
#include "common.cuh"

using uint8 = unsigned char;

constexpr int THREADS = 256, EACH = 4;

// d_w (n, 8) and codes (n, 4 bytes), the even column in the low half; scales, zeros, d_scales, d_zeros (n / TEAM).
extern "C" __global__ void __launch_bounds__(THREADS)
scale_gradients(const T* __restrict__ d_w, const uint8* __restrict__ codes, const float* __restrict__ scales,
                const float* __restrict__ zeros, float* __restrict__ d_scales, float* __restrict__ d_zeros, int64 n) {
  constexpr int V = per_16_bytes<T> < 8 ? per_16_bytes<T> : 8;
  int64 first = (int64)blockIdx.x * (THREADS * EACH) + threadIdx.x;
  Vec<T, V> g[EACH][8 / V];
  Vec<uint8, 4> q[EACH];
  // n is a multiple of TEAM: a team is inside as a whole, or not at all.
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int64 at = first + i * THREADS;
    bool inside = at < n;
#pragma unroll
    for (int j = 0; j < 8 / V; j++) g[i][j] = inside ? load_vec<T, V>(d_w + at * 8 + j * V) : Vec<T, V>{};
    q[i] = inside ? load_vec<uint8, 4>(codes + at * 4) : Vec<uint8, 4>{};
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int64 at = first + i * THREADS, group = at / TEAM;
    float zero = !ZEROS ? 8.0f : at < n ? zeros[group] : 0.0f, by_code = 0.0f, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float x = to_float(g[i][j / V].at[j % V]);
      by_code += x * ((float)(int)(q[i].at[j / 2] >> 4 * (j % 2) & 15) - zero);
      sum += x;
    }
#pragma unroll
    for (int other = TEAM / 2; other > 0; other /= 2) {
      by_code += __shfl_xor_sync(0xffffffffu, by_code, other);
      if (ZEROS) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    if (at < n && threadIdx.x % TEAM == 0) {
      d_scales[group] = by_code;
      if (ZEROS) d_zeros[group] = -(sum * scales[group]);
    }
  }
}
