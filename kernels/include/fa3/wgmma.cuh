// Warpgroup matrix products: shared-memory descriptors and ordering. The instruction wrappers
// Wgmma<Dtype, N>::ss and ::rs list N/2 accumulators each and are printed by the template for the
// N in use (templates/cuda/wgmma.cuh.jinja).
#pragma once
#include "fa3/ptx.cuh"

namespace fa3 {

template <class Dtype, int N>
struct Wgmma;

// Swizzled operand in shared memory, as rows of `SwizzleBytes` (a panel). PTX ISA, "matrix
// descriptor": bits 0-13 address, 16-29 leading offset, 32-45 stride offset (all / 16), 62-63
// swizzle. Advancing inside the operand adds bytes / 16 to the low word.
template <int SwizzleBytes>
struct Descriptor {
  static_assert(SwizzleBytes == 128 || SwizzleBytes == 64, "panels are 128 or 64 bytes wide");
  static constexpr uint32_t kHigh =
      (SwizzleBytes * 8 / 16) | (SwizzleBytes == 128 ? 1u << 30 : 2u << 30);

  // `panel_bytes` is the distance between panels of an operand whose contiguous axis is N
  // (values); operands contiguous along the reduced axis (queries, keys) ignore it.
  FA3_DEVICE static uint32_t low(uint32_t address, int panel_bytes) {
    return (address >> 4) | (static_cast<uint32_t>(panel_bytes >> 4) << 16);
  }
  FA3_DEVICE static uint64_t make(uint32_t low) {
    return (static_cast<uint64_t>(kHigh) << 32) | low;
  }
};

FA3_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FA3_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` of the committed groups are still running.
template <int Pending>
FA3_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving reads of an accumulator above the wait that precedes this.
template <int N>
FA3_DEVICE void wgmma_pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Keeps an A operand in its registers until here, behind the wait for the product that reads it.
template <int N>
FA3_DEVICE void wgmma_hold(const uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" ::"r"(x[i]) : "memory");
}

}  // namespace fa3
