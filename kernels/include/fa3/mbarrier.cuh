// Shared-memory mbarriers: a full and an empty one for each stage of a TMA pipeline.
#pragma once
#include "fa3/ptx.cuh"

namespace fa3 {

FA3_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes the initialised barriers visible to the copy engine; a __syncthreads follows.
FA3_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FA3_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

FA3_DEVICE void mbarrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Returns once the phase of this parity has completed; a fresh barrier counts as having completed
// parity 1, so that producers start by waiting for 1 on the empty barriers.
FA3_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni end;\n"
      "bra.uni wait;\n"
      "end:\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Position in a ring of stages, as the number of those passed; the parity flips at each wrap.
template <int Stages>
struct PipelineState {
  uint32_t passed = 0;

  FA3_DEVICE uint32_t stage() const { return passed % Stages; }
  FA3_DEVICE uint32_t parity() const { return passed / Stages & 1; }
  FA3_DEVICE void advance() { ++passed; }
};

}  // namespace fa3
