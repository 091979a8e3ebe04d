// What the products of wide batches on Hopper share: tensor cores of four warps that read x from shared memory, and copies of
// weights. T: type of x; NT: tiles of 8 rows of x, 1, 2, 4 or 8.
#pragma once
#include "decode.cuh"

#if defined(MOAI_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#endif
constexpr int HALF = NT * 128, PRODUCT = 2 * HALF;  // bytes of x: 8 columns, 16 columns

// Four matrices of 8 rows of 16 bytes: lane l tells where row l % 8 of matrix l / 8 is, and gets word l % 4 of row l / 4 of
// each (PTX ISA 9.7.14.5.15).
DEVICE void load_matrices(uint32 (&to)[4], const void* row) {
#ifdef MOAI_HOST
  host_ldmatrix(to, row, 4, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"((uint32)__cvta_generic_to_shared(row))
               : "memory");
#endif
}

// ---- Tensor cores of four warps: d (64, 8 NT) += a (64, 16) b, a warp's a and d as in mma_16, b as described above.

// Where b is: address, bytes from the first 8 columns to the second and from 8 rows to the next, no swizzle.
#ifdef MOAI_HOST
using Vectors = const char*;
DEVICE Vectors described(const void* x) { return (const char*)x; }
DEVICE Vectors behind(Vectors x, int bytes) { return x + bytes; }
#else
using Vectors = uint32;  // the lower word; the upper one is what 8 rows take
DEVICE Vectors described(const void* x) { return ((uint32)__cvta_generic_to_shared(x) & 0x3ffff) >> 4 | (HALF >> 4) << 16; }
DEVICE Vectors behind(Vectors x, int bytes) { return x + (uint32)(bytes >> 4); }
#endif

#define PRODUCT_16(TYPE, SIZE, D, A, B, P, ...)                                                                     \
  asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, " P ", 0;\nmov.b64 b, {" B ", 8};\n"                  \
               "wgmma.mma_async.sync.aligned.m64n" SIZE "k16.f32." TYPE "." TYPE " {" D "}, {" A "}, b, p, 1, 1, 0;\n}" \
               : __VA_ARGS__)
#define OUT4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define IN "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(add)
#define D4 "%0, %1, %2, %3"
#define D8 D4 ", %4, %5, %6, %7"
#define D16 D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D32 D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PRODUCT_OF(TYPE)                                                                                            \
  if constexpr (NT == 1)                                                                                            \
    PRODUCT_16(TYPE, "8", D4, "%4, %5, %6, %7", "%8", "%9", OUT4(0) : IN);                                          \
  else if constexpr (NT == 2)                                                                                       \
    PRODUCT_16(TYPE, "16", D8, "%8, %9, %10, %11", "%12", "%13", OUT4(0), OUT4(1) : IN);                            \
  else if constexpr (NT == 4)                                                                                       \
    PRODUCT_16(TYPE, "32", D16, "%16, %17, %18, %19", "%20", "%21", OUT4(0), OUT4(1), OUT4(2), OUT4(3) : IN);       \
  else                                                                                                              \
    PRODUCT_16(TYPE, "64", D32, "%32, %33, %34, %35", "%36", "%37", OUT4(0), OUT4(1), OUT4(2), OUT4(3), OUT4(4),    \
               OUT4(5), OUT4(6), OUT4(7) : IN)

// Adds to d, or with `add` 0 overwrites it. All of a, d and x are out of bounds until `finish`.
template <int TILES>
DEVICE void product_16(float (&d)[TILES][4], const uint32 (&a)[4], Vectors x, int add) {
#if defined(MOAI_HOST)
  const int lane = threadIdx.x % 32;
  for (int n = 0; n < NT; n++) {
    uint32 b[2];
    for (int half = 0; half < 2; half++) __builtin_memcpy(&b[half], x + half * HALF + n * 128 + lane * 4, 4);
    if (!add) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0.0f;
    mma_16<T>(d[n], a, b);
  }
#elif defined(HAS_WGMMA)
  if constexpr (is_bf16<T>) {
    PRODUCT_OF("bf16");
  } else {
    PRODUCT_OF("f16");
  }
#endif
}

// Before products: their registers, a's too, are complete.
template <int COUNT>
DEVICE void start(uint32 (&a)[COUNT][4]) {
#if !defined(MOAI_HOST) && defined(HAS_WGMMA)
#pragma unroll
  for (int q = 0; q < COUNT; q++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[q][i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Products asked for since `start` are one group; what is done between `end_of_group` and `finish` is done beside them.
DEVICE void end_of_group() {
#if !defined(MOAI_HOST) && defined(HAS_WGMMA)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int TILES>
DEVICE void finish(float (&d)[TILES][4]) {
#if !defined(MOAI_HOST) && defined(HAS_WGMMA)
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[n][i])::"memory");  // nothing reads it before
#endif
}

// A chunk of 16 rows of W as `a` of its products from `first` on. piece: this lane's of rows 0 to 7, 32 in front of its other.
template <int COUNT>
DEVICE void decode_chunk(uint32 (&a)[COUNT][4], int first, const Words* piece) {
  const Words above = piece[0], below = piece[32];
#pragma unroll
  for (int s = 0; s < F::COLUMNS / 4; s++) {
    F::weights(a[first + s][0], a[first + s][2], above, s);
    F::weights(a[first + s][1], a[first + s][3], below, s);
  }
}

// 16 bytes of a weight, which no one reads a second time: it is the first to leave the L2 cache, so that sums and states
// stay; the line that it begins comes along.
DEVICE unsigned long long passing() {
#ifdef MOAI_HOST
  return 0;
#else
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}
DEVICE void copy_weight(void* shared, const void* global, bool valid, unsigned long long policy) {
#ifdef MOAI_HOST
  copy_async_16(shared, global, valid);
#else
  const uint32 to = (uint32)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(global),
               "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
#endif
}
