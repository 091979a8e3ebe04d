// What every kernel of moai shares: number types, 16-byte vectors, asynchronous copies, tensor-core products.
//
// No other header is included, so that a user needs NVRTC and nothing else. Every instruction that C++ can't spell
// stands here once, beside a portable twin (MOAI_HOST) with which the kernels run on a processor, for tests.
#pragma once

#ifdef MOAI_HOST
#define DEVICE inline
#else
#define DEVICE __device__ __forceinline__
#endif

using int64 = long long;
using uint32 = unsigned int;
using uint16 = unsigned short;

// ---- Numbers. 16-bit types are bit patterns; arithmetic is always fp32.

struct __nv_bfloat16 {
  uint16 bits;
};
struct __half {
  uint16 bits;
};
using bf16 = __nv_bfloat16;
using fp16 = __half;

DEVICE uint32 float_bits(float x) {
#ifdef MOAI_HOST
  uint32 u;
  __builtin_memcpy(&u, &x, 4);
  return u;
#else
  return __float_as_uint(x);
#endif
}

DEVICE float bits_float(uint32 u) {
#ifdef MOAI_HOST
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
#else
  return __uint_as_float(u);
#endif
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return bits_float((uint32)x.bits << 16); }
DEVICE float to_float(fp16 x) {
  float y;
#ifdef MOAI_HOST
  _Float16 h;
  __builtin_memcpy(&h, &x.bits, 2);
  y = (float)h;
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
#endif
  return y;
}

template <class X>
DEVICE X from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
  bf16 y;
#ifdef MOAI_HOST
  uint32 u = float_bits(x);
  y.bits = (x != x) ? 0x7fff : (uint16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
  return y;
}
template <>
DEVICE fp16 from_float<fp16>(float x) {
  fp16 y;
#ifdef MOAI_HOST
  _Float16 h = (_Float16)x;
  __builtin_memcpy(&y.bits, &h, 2);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
  return y;
}

// n values that travel together: 16 bytes is what one thread loads or stores at once.
template <class X, int n>
struct alignas(sizeof(X) * n) Vec {
  X at[n];
};
template <class X>
constexpr int per_16_bytes = 16 / sizeof(X);

template <class X, int n>
DEVICE Vec<X, n> load_vec(const X* p) {
  return *reinterpret_cast<const Vec<X, n>*>(p);
}
template <class X, int n>
DEVICE void store_vec(X* p, const Vec<X, n>& v) {
  *reinterpret_cast<Vec<X, n>*>(p) = v;
}

// Two numbers at once: one instruction for 16-bit types. `a` comes first in memory.
template <class X>
DEVICE Vec<X, 2> pair_from_floats(float a, float b) {
  return {{from_float<X>(a), from_float<X>(b)}};
}
#ifndef MOAI_HOST
template <>
DEVICE Vec<bf16, 2> pair_from_floats<bf16>(float a, float b) {
  Vec<bf16, 2> y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(*reinterpret_cast<uint32*>(&y)) : "f"(b), "f"(a));
  return y;
}
template <>
DEVICE Vec<fp16, 2> pair_from_floats<fp16>(float a, float b) {
  Vec<fp16, 2> y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(*reinterpret_cast<uint32*>(&y)) : "f"(b), "f"(a));
  return y;
}
#endif

// ---- Elementary functions. The approximations are within 2 units of the last fp32 place; denormals are zero.

DEVICE float exp2_approx(float x) {
#ifdef MOAI_HOST
  return __builtin_exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

DEVICE float log2_approx(float x) {
#ifdef MOAI_HOST
  return __builtin_log2f(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

DEVICE float reciprocal_approx(float x) {
#ifdef MOAI_HOST
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

DEVICE float sqrt_approx(float x) {
#ifdef MOAI_HOST
  return __builtin_sqrtf(x);
#else
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// 1 / (1 + e^-x)
DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-LOG2E * x)); }

// log(1 + e^x) = max(x, 0) + log(1 + e), e = exp(-|x|); the logarithm is e times a polynomial in e, fitted on [0, 1] to a
// relative error of 2e-7, so that nothing is lost where e is tiny.
DEVICE float softplus(float x, float e) {
  float p = -0.0085392063f;
  p = p * e + 0.0440896228f;
  p = p * e - 0.1076816991f;
  p = p * e + 0.1774524003f;
  p = p * e - 0.2449546307f;
  p = p * e + 0.3327547908f;
  p = p * e - 0.4999740422f;
  p = p * e + 0.9999998212f;
  return p * e + fmaxf(x, 0.0f);
}
DEVICE float softplus(float x) { return softplus(x, exp2_approx(-LOG2E * fabsf(x))); }

// ---- Asynchronous copies from global to shared memory, 16 bytes each; zeros where `valid` is false.

DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
#ifdef MOAI_HOST
  if (valid) __builtin_memcpy(shared, global, 16);
  else __builtin_memset(shared, 0, 16);
#else
  uint32 to = (uint32)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
#endif
}

// 4 bytes, in the same way.
DEVICE void copy_async_4(void* shared, const void* global, bool valid = true) {
#ifdef MOAI_HOST
  if (valid) __builtin_memcpy(shared, global, 4);
  else __builtin_memset(shared, 0, 4);
#else
  uint32 to = (uint32)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid ? 4 : 0) : "memory");
#endif
}

DEVICE void copy_async_commit() {
#ifndef MOAI_HOST
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` groups of this thread are still under way.
template <int pending>
DEVICE void copy_async_wait() {
#ifndef MOAI_HOST
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- Tensor cores: d += a b with a (16, 8), b (8, 8), tf32 inputs (the low 13 bits of an fp32 are dropped), fp32 sums.
// Lane l of the warp, g = l / 4, t = l % 4, holds a = {(g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)},
// b = {(t, g), (t + 4, g)}, d = {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}, each as (row, column).

#ifdef MOAI_HOST
// Collective over the warp: whoever compiles for a processor brings it, with threads, barriers and shuffles.
void host_mma_tf32(float* d, const uint32* a, const uint32* b);
#endif

DEVICE void mma_tf32(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
#ifdef MOAI_HOST
  host_mma_tf32(d, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// x, a number or an address, in a register from here on: the compiler would make it anew at each use.
template <class X>
DEVICE X keep(X x) {
#ifndef MOAI_HOST
  if constexpr (sizeof(X) == 8) asm volatile("" : "+l"(x));
  else asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- Sums over the 32 lanes of a warp, the same bits in every lane.
DEVICE float warp_sum(float x) {
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}
