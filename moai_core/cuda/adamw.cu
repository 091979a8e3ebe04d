// moai: kernels adamw; macros P=bf16 S=bf16 | P=bf16 S=float | P=float S=float
//
// One step of AdamW (arXiv 1711.05101) on many parameters, computed in fp32, each element read and written once:
//
//   g = scale gradient;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
//   w = (1 - lr decay) w - step m / (sqrt(v) / root + eps),  step = lr / (1 - beta1^t),  root = sqrt(1 - beta2^t)
//
//   P  parameters and gradients     S  the state: moments and, where P is narrower, the master weights w
//
// What of a gradient is not finite changes nothing. bf16 state is rounded stochastically (arXiv 2010.06192) by Philox noise (Random123, SC 2011), a function of the
// parameter's key, the count of updates and the element: not of the grid, so it is the same on any GPU.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int N = 8;               // elements a thread takes at once
constexpr int64 CHUNK = 8192;      // elements of a block: the host counts blocks with it
constexpr bool MASTERS = sizeof(P) < sizeof(S);
constexpr bool NOISY = sizeof(S) == 2;

struct Row {  // one parameter; the host writes it as eight int64
  int64 first, size;  // its first block, its elements
  P* p;
  S* m;
  S* v;
  S* w;  // the master weights; p itself where there are none
  unsigned long long key;
  int64 wide;  // whether every address is a multiple of 16 bytes
};

// Philox4x32 with 7 rounds, the fewest that pass BigCrush.
DEVICE void philox(uint32 (&x)[4], uint32 key0, uint32 key1) {
#pragma unroll
  for (int round = 0; round < 7; round++) {
    unsigned long long a = (unsigned long long)0xD2511F53u * x[0], b = (unsigned long long)0xCD9E8D57u * x[2];
    uint32 old1 = x[1], old3 = x[3];
    x[0] = (uint32)(b >> 32) ^ old1 ^ key0;
    x[1] = (uint32)b;
    x[2] = (uint32)(a >> 32) ^ old3 ^ key1;
    x[3] = (uint32)a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// N numbers of 16 bits for tensor `which` (0 w, 1 m, 2 v), vector `i` of its elements.
struct Noise {
  uint32 at[4];
  DEVICE Noise(unsigned long long key, int64 update, int64 i, uint32 which) : at{} {
    if (!NOISY) return;
    at[0] = (uint32)i, at[1] = (uint32)(i >> 32), at[2] = (uint32)update, at[3] = which;
    philox(at, (uint32)key, (uint32)(key >> 32));
  }
  DEVICE uint32 operator[](int n) const { return (at[n / 2] >> (n % 2 * 16)) & 0xffffu; }
};

DEVICE void round_to(float& to, float x, uint32) { to = x; }
// The lower half of the bits carries into the upper one with the probability that makes the expectation exact; sign and
// magnitude, so the carry leads away from zero. A NaN would carry into another number.
DEVICE void round_to(bf16& to, float x, uint32 noise) {
  to.bits = x != x ? (uint16)0x7fc0 : (uint16)((float_bits(x) + noise) >> 16);
}

// N elements at `at`: in loads and stores of 16 bytes, or one by one the `left` that there are.
template <bool whole, class T>
DEVICE Vec<T, N> load(const T* at, int64 left) {
  Vec<T, N> to;
  constexpr int n = per_16_bytes<T>;
#pragma unroll
  for (int k = 0; k < N; k += n) {
    Vec<T, n> part;
    if (whole) part = load_vec<T, n>(at + k);
#pragma unroll
    for (int j = 0; j < n; j++) to.at[k + j] = whole ? part.at[j] : k + j < left ? at[k + j] : from_float<T>(0.0f);
  }
  return to;
}

template <bool whole, class T>
DEVICE void store(T* at, const Vec<T, N>& from, int64 left) {
  constexpr int n = per_16_bytes<T>;
#pragma unroll
  for (int k = 0; k < N; k += n) {
    Vec<T, n> part;
#pragma unroll
    for (int j = 0; j < n; j++) {
      part.at[j] = from.at[k + j];
      if (!whole && k + j < left) at[k + j] = part.at[j];
    }
    if (whole) store_vec<T, n>(at + k, part);
  }
}

// An address that was read from memory could be in any space; the compiler is told which.
template <class Q>
DEVICE Q* in_global(Q* address) {
#ifndef MOAI_HOST
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

struct Step {
  int64 update;
  float factor, gain1, beta2, gain2, keep, step, over_root, eps;
};

DEVICE bool finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

// The N elements from `i` on; the sum of the squares of their gradients.
template <bool whole>
DEVICE float advance(const Row& row, const P* gradient, const Step& s, int64 i, int64 left) {
  const Vec<P, N> g = load<whole>(gradient + i, left);
  Vec<S, N> m = load<whole>(row.m + i, left), v = load<whole>(row.v + i, left), w = load<whole>(row.w + i, left);
  const Noise of_w(row.key, s.update, i / N, 0), of_m(row.key, s.update, i / N, 1), of_v(row.key, s.update, i / N, 2);
  Vec<P, N> p;
  float squares = 0.0f;
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float d = s.factor * to_float(g.at[n]);
    const float first = to_float(m.at[n]) + s.gain1 * (d - to_float(m.at[n]));
    const float second = s.beta2 * to_float(v.at[n]) + s.gain2 * (d * d);
    const float length = first * reciprocal_approx(sqrt_approx(second) * s.over_root + s.eps);
    const float updated = s.keep * to_float(w.at[n]) - s.step * length;
    const bool real = finite(d);  // what is rounded already stays as it is under any noise
    const float value = real ? updated : to_float(w.at[n]);
    round_to(m.at[n], real ? first : to_float(m.at[n]), of_m[n]);
    round_to(v.at[n], real ? second : to_float(v.at[n]), of_v[n]);
    round_to(w.at[n], value, of_w[n]);
    if (MASTERS) p.at[n] = from_float<P>(value);
    squares += d * d;
  }
  store<whole>(row.m + i, m, left);
  store<whole>(row.v + i, v, left);
  store<whole>(row.w + i, w, left);
  if (MASTERS) store<whole>(row.p + i, p, left);
  return squares;
}

// rows: (count), by `first`; gradients: (count) addresses, in that order, or null where there is one parameter with the
// gradient `only`; scale: one number or null for 1; squares: (blocks) or null, sums of the scaled gradients' squares.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(const Row* __restrict__ rows, const int64* __restrict__ gradients, const P* only,
          const float* __restrict__ scale, float* squares, int64 count, int64 update, float gain1, float beta2,
          float gain2, float keep, float step, float over_root, float eps) {
  const int64 block = blockIdx.x;
  int64 low = 0, high = count;  // the row is the last whose first block is not behind this one
  while (high - low > 1) {
    const int64 middle = (low + high) / 2;
    if (rows[middle].first <= block) low = middle;
    else high = middle;
  }
  Row row = rows[low];
  row.p = in_global(row.p), row.m = in_global(row.m), row.v = in_global(row.v), row.w = in_global(row.w);
  const P* gradient = in_global(gradients ? reinterpret_cast<const P*>(gradients[low]) : only);
  const bool wide = row.wide && (unsigned long long)gradient % 16 == 0;
  const Step s = {update, scale ? *scale : 1.0f, gain1, beta2, gain2, keep, step, over_root, eps};
  const int64 begin = (block - row.first) * CHUNK, end = row.size < begin + CHUNK ? row.size : begin + CHUNK;
  float sum = 0.0f;
  for (int64 i = begin + threadIdx.x * N; i < end; i += THREADS * N) {
    if (wide && end - i >= N) sum += advance<true>(row, gradient, s, i, end - i);
    else sum += advance<false>(row, gradient, s, i, end - i);
  }
  if (!squares) return;
  __shared__ float parts[THREADS / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < THREADS / 32; warp++) sum += parts[warp];
    squares[block] = sum;
  }
}
