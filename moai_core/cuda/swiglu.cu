// SwiGLU's product, out = silu(gate) * up, and its gradients, V values a thread of n in all. TYPE: of every tensor.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
swiglu_forward(const TYPE* __restrict__ gate, const TYPE* __restrict__ up, TYPE* __restrict__ out, int64 n) {
  int64 at = ((int64)blockIdx.x * 256 + threadIdx.x) * V;
  if (at >= n) return;
  Vec<TYPE, V> g = load_vec<TYPE, V>(gate + at), u = load_vec<TYPE, V>(up + at);
#pragma unroll
  for (int i = 0; i < V; i++) {
    float x = to_float(g.at[i]);
    g.at[i] = from_float<TYPE>(x * sigmoid(x) * to_float(u.at[i]));
  }
  store_vec<TYPE, V>(out + at, g);
}

// silu'(x) = s + x s (1 - s), s = sigmoid(x)
extern "C" __global__ void __launch_bounds__(256)
swiglu_backward(const TYPE* __restrict__ d_out, const TYPE* __restrict__ gate, const TYPE* __restrict__ up,
                TYPE* __restrict__ d_gate, TYPE* __restrict__ d_up, int64 n) {
  int64 at = ((int64)blockIdx.x * 256 + threadIdx.x) * V;
  if (at >= n) return;
  Vec<TYPE, V> d = load_vec<TYPE, V>(d_out + at), g = load_vec<TYPE, V>(gate + at), u = load_vec<TYPE, V>(up + at);
#pragma unroll
  for (int i = 0; i < V; i++) {
    float x = to_float(g.at[i]), s = sigmoid(x), y = x * s, dy = to_float(d.at[i]);
    g.at[i] = from_float<TYPE>(dy * to_float(u.at[i]) * (s + y * (1.0f - s)));
    u.at[i] = from_float<TYPE>(dy * y);
  }
  store_vec<TYPE, V>(d_gate + at, g);
  store_vec<TYPE, V>(d_up + at, u);
}
