// moai: kernels cross_entropy, scale_in_place; macros T=bf16 V=8 BLOCK=1024 | T=float V=4 BLOCK=512 | T=fp16 V=1 BLOCK=256
//
// Cross-entropy of rows of logits, and the logits' gradient in their place.
//
//   loss = log(sum_v exp(logits_v)) - logits_target;   d_logits = (softmax(logits) - onehot(target)) * scale
//
// A block of BLOCK threads takes a row: one pass for the largest logit and the sum of exponentials (kept together, arXiv
// 1805.02867), one that writes. As much of the row as shared memory has room for stays there between the two; the rest
// is read twice. T: of the logits, V: logits a thread moves at once.
#include "common.cuh"

constexpr int WARPS = BLOCK / 32;
constexpr int AHEAD = 4;  // vectors of a thread under way at once
constexpr float LOWEST = -3.402823466e38f;  // instead of -infinity, which would make NaN of (-infinity) - (-infinity)

using Pack = Vec<T, V>;

// The largest logit so far and the sum of exp(logit - largest).
struct Sum {
  float largest, sum;
};

DEVICE Sum join(Sum a, Sum b) {
  // NaN stays: fmaxf would drop it, the sums keep it.
  float m = fmaxf(a.largest, b.largest);
  return {m, a.sum * exp2_approx((a.largest - m) * LOG2E) + b.sum * exp2_approx((b.largest - m) * LOG2E)};
}

DEVICE void add(Sum& to, const Pack& x) {
  float m = to.largest;
#pragma unroll
  for (int i = 0; i < V; i++) m = fmaxf(m, to_float(x.at[i]));
  float sum = to.sum * exp2_approx((to.largest - m) * LOG2E);
#pragma unroll
  for (int i = 0; i < V; i++) sum += exp2_approx((to_float(x.at[i]) - m) * LOG2E);
  to = {m, sum};
}

DEVICE Sum warp_join(Sum mine) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2)
    mine = join(mine, {__shfl_xor_sync(0xffffffffu, mine.largest, other), __shfl_xor_sync(0xffffffffu, mine.sum, other)});
  return mine;
}

// Over the block, the same bits in every thread.
DEVICE Sum block_join(Sum mine, Sum* scratch) {
  mine = warp_join(mine);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = mine;
  __syncthreads();
  return warp_join(threadIdx.x % 32 < WARPS ? scratch[threadIdx.x % 32] : Sum{LOWEST, 0.0f});
}

// losses (rows), 0 for a target of -100, NaN for one outside of the vocabulary. `scale`: one number, null for 1.
// `vocabulary` is a multiple of V. `kept`: vectors of a row that dynamic shared memory has room for. With write = 0 the
// logits stay as they are.
extern "C" __global__ void __launch_bounds__(BLOCK)
cross_entropy(T* __restrict__ logits, const int64* __restrict__ targets, const float* __restrict__ scale,
              float* __restrict__ losses, int64 vocabulary, int64 kept, int64 write) {
  extern __shared__ Pack row_part[];
  __shared__ Sum scratch[WARPS];
  int64 row = blockIdx.x, target = targets[row];
  T* mine = logits + row * vocabulary;
  int count = (int)(vocabulary / V), keep = (int)kept;

  if (target == -100) {
    if (threadIdx.x == 0) losses[row] = 0.0f;
    if (write)
      for (int i = threadIdx.x; i < count; i += BLOCK) store_vec<T, V>(mine + (int64)i * V, Pack{});
    return;
  }
  bool known = target >= 0 && target < vocabulary;
  float of_target = known ? to_float(mine[target]) : 0.0f;  // read before any thread writes

  Sum sum = {LOWEST, 0.0f};
  int first = threadIdx.x;
  for (; first + (AHEAD - 1) * BLOCK < count; first += AHEAD * BLOCK) {
    Pack x[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) x[a] = load_vec<T, V>(mine + (int64)(first + a * BLOCK) * V);
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      if (first + a * BLOCK < keep) row_part[first + a * BLOCK] = x[a];
      add(sum, x[a]);
    }
  }
  for (; first < count; first += BLOCK) {
    Pack x = load_vec<T, V>(mine + (int64)first * V);
    if (first < keep) row_part[first] = x;
    add(sum, x);
  }
  sum = block_join(sum, scratch);
  if (threadIdx.x == 0) losses[row] = known ? (sum.largest - of_target) + logf(sum.sum) : bits_float(0x7fc00000u);
  if (!write) return;

  float factor = scale ? *scale : 1.0f, share = factor / sum.sum;
  int target_pack = (int)(target / V);
#pragma unroll AHEAD
  for (int i = threadIdx.x; i < count; i += BLOCK) {
    Pack x = i < keep ? row_part[i] : load_vec<T, V>(mine + (int64)i * V);
    float d[V];
#pragma unroll
    for (int j = 0; j < V; j++) d[j] = exp2_approx((to_float(x.at[j]) - sum.largest) * LOG2E) * share;
    if (i == target_pack)
#pragma unroll
      for (int j = 0; j < V; j++) d[j] -= (int64)i * V + j == target ? factor : 0.0f;
#pragma unroll
    for (int j = 0; j < V; j++) x.at[j] = from_float<T>(d[j]);
    store_vec<T, V>(mine + (int64)i * V, x);
  }
}

// x *= *by in place; nothing is read or written where that is 1.
extern "C" __global__ void __launch_bounds__(256)
scale_in_place(T* __restrict__ x, const float* __restrict__ by, int64 n) {
  float factor = *by;
  if (factor == 1.0f) return;
  for (int64 at = ((int64)blockIdx.x * 256 + threadIdx.x) * V; at < n; at += (int64)gridDim.x * 256 * V) {
    Pack v = load_vec<T, V>(x + at);
#pragma unroll
    for (int i = 0; i < V; i++) v.at[i] = from_float<T>(to_float(v.at[i]) * factor);
    store_vec<T, V>(x + at, v);
  }
}
