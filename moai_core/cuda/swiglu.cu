// moai: kernels swiglu_forward, swiglu_backward; macros T=bf16 V=8 | T=float V=4 | T=fp16 V=1
//
// SwiGLU's product, out = silu(gate) * up, and its gradients, V values a thread of n in all. T: of every tensor.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
swiglu_forward(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ out, int64 n) {
  int64 at = ((int64)blockIdx.x * 256 + threadIdx.x) * V;
  if (at >= n) return;
  Vec<T, V> g = load_vec<T, V>(gate + at), u = load_vec<T, V>(up + at);
#pragma unroll
  for (int i = 0; i < V; i++) {
    float x = to_float(g.at[i]);
    g.at[i] = from_float<T>(x * sigmoid(x) * to_float(u.at[i]));
  }
  store_vec<T, V>(out + at, g);
}

// silu'(x) = s + x s (1 - s), s = sigmoid(x). With `again`, the product is made again, with the same bits, in d_out's place.
extern "C" __global__ void __launch_bounds__(256)
swiglu_backward(T* d_out, const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ d_gate,
                T* __restrict__ d_up, int64 n, int64 again) {
  int64 at = ((int64)blockIdx.x * 256 + threadIdx.x) * V;
  if (at >= n) return;
  Vec<T, V> d = load_vec<T, V>(d_out + at), g = load_vec<T, V>(gate + at), u = load_vec<T, V>(up + at);
#pragma unroll
  for (int i = 0; i < V; i++) {
    float x = to_float(g.at[i]), s = sigmoid(x), y = x * s, dy = to_float(d.at[i]), other = to_float(u.at[i]);
    g.at[i] = from_float<T>(dy * other * (s + y * (1.0f - s)));
    u.at[i] = from_float<T>(dy * y);
    d.at[i] = from_float<T>(y * other);
  }
  if (again) store_vec<T, V>(d_out + at, d);
  store_vec<T, V>(d_gate + at, g);
  store_vec<T, V>(d_up + at, u);
}
