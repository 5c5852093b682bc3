// Tensor memory accelerator: bulk loads of a box of a 4-D tensor into swizzled shared memory.
#pragma once
#include "fa3/ptx.cuh"

namespace fa3 {

// CUtensorMap as the driver encodes it; axes from the innermost: d, sequence, head, batch.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// L2 eviction policies in the encoding of createpolicy: queries are read once, keys and values by
// every query block of the head.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

FA3_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Elements outside the tensor arrive as zeros and count towards the barrier's bytes.
FA3_DEVICE void tma_load(uint32_t dst, const TensorMap& map, uint32_t barrier, uint64_t policy,
                         int d, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(dst),
      "l"(&map), "r"(d), "r"(row), "r"(head), "r"(batch), "r"(barrier), "l"(policy)
      : "memory");
}

// `bytes` contiguous ones, a multiple of 16.
FA3_DEVICE void bulk_load(uint32_t dst, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// A box of shared memory to the tensor, or added to it; elements outside are left out. Part of this
// thread's bulk group.
template <bool Add>
FA3_DEVICE void tma_store(const TensorMap& map, uint32_t from, int d, int row, int head,
                          int batch) {
  if constexpr (Add) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group"
        " [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
        "r"(d), "r"(row), "r"(head), "r"(batch), "r"(from)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group"
        " [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
        "r"(d), "r"(row), "r"(head), "r"(batch), "r"(from)
        : "memory");
  }
}

FA3_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the shared memory that this thread's groups read may be written again.
FA3_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Until what this thread's groups write is written.
FA3_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace fa3
