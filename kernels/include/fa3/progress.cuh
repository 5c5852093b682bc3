// Counters in global memory by which thread blocks tell each other how far they are.
//
// What happened before signal(), in its thread or in others that it has synchronised with (a
// barrier of the block is enough), is seen after await() and by whoever synchronises with that
// thread: a fence, a relaxed write, a relaxed read that sees it and a fence are a release and an
// acquire at gpu scope, and causality order is transitive over scopes (PTX ISA, memory consistency
// model).
#pragma once
#include "fa3/ptx.cuh"

namespace fa3 {

constexpr int kCounterInts = 32;  // from one counter to the next: a cache line each

FA3_DEVICE void signal(int* counter) {
  asm volatile(
      "fence.acq_rel.gpu;\n"
      "red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(counter)
      : "memory");
}

// The two of them.
FA3_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
FA3_DEVICE void count(int* counter) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Global memory that ordinary instructions have written is read by the copy engine after it.
FA3_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Until `count` have signalled.
FA3_DEVICE void await(const int* counter, int count) {
  for (;;) {
    int now;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    if (now >= count) break;
    asm volatile("nanosleep.u32 250;");
  }
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

}  // namespace fa3
