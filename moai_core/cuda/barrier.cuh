// Barriers of shared memory and the copy engine, from Hopper on (PTX ISA 9.7.13.15, 9.7.9.25): a barrier's phase ends when all
// have arrived and all bytes that were announced. Elsewhere nothing waits and nothing is copied: who includes this asks first.
#pragma once
#include "common.cuh"

using Barrier = unsigned long long;
#ifdef MOAI_HOST
void host_yield();
struct HostBarrier {
  uint16 left, count;
  uint32 phase;
};
#define AT(barrier) ((HostBarrier*)(barrier))
#else
#define AT(barrier) "r"((uint32)__cvta_generic_to_shared(barrier))
#endif

DEVICE void make_barrier(Barrier* barrier, int count) {
#ifdef MOAI_HOST
  AT(barrier)->left = AT(barrier)->count = (uint16)count, AT(barrier)->phase = 0;
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::AT(barrier), "r"(count) : "memory");
#endif
}
// To the copy engine, behind all that this thread made and before the block's barrier: by a fence of the barriers, ...
DEVICE void show_barriers() {
#if !defined(MOAI_HOST) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// ... or of all that it wrote into shared memory.
DEVICE void show_shared() {
#if !defined(MOAI_HOST) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEVICE void arrive(Barrier* barrier) {
#ifdef MOAI_HOST
  if (--AT(barrier)->left == 0) AT(barrier)->left = AT(barrier)->count, AT(barrier)->phase ^= 1;
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::AT(barrier) : "memory");
#endif
}
// Until the phase of this parity has ended.
DEVICE void wait_for(Barrier* barrier, uint32 parity) {
#ifdef MOAI_HOST
  while (((volatile HostBarrier*)barrier)->phase == parity) host_yield();
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::AT(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Arrives, and announces the bytes of the copies that follow.
DEVICE void expect(Barrier* barrier, uint32 bytes) {
#if !defined(MOAI_HOST) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::AT(barrier), "r"(bytes) : "memory");
#endif
}
// From global to shared memory, announced before. On a processor, where it is there at once, only copy_bulk arrives.
DEVICE void copy_run(void* to, const void* from, uint32 bytes, Barrier* barrier) {
#ifdef MOAI_HOST
  __builtin_memcpy(to, from, bytes);
#elif __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::AT(to), "l"(from),
               "r"(bytes), AT(barrier)
               : "memory");
#endif
}
// One copy that is all its barrier waits for.
DEVICE void copy_bulk(void* to, const void* from, uint32 bytes, Barrier* barrier) {
  expect(barrier, bytes);
  copy_run(to, from, bytes, barrier);
#ifdef MOAI_HOST
  arrive(barrier);
#endif
}
#undef AT
