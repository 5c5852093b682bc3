// Tiles go from the producer to the consumers of a block through two slots in shared memory.
#pragma once
#include "fa3/mbarrier.cuh"
#include "fa3/scheduler.cuh"

namespace fa3 {

// `full` and `empty` are the first of two barriers each; slots are of four words.
struct TileRing {
  uint32_t slots, full, empty;
  PipelineState<2> state = {};

  FA3_DEVICE void publish(const TileCoord& tile) {
    mbarrier_wait(empty + 8 * state.stage(), state.parity() ^ 1);
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(slots + 16 * state.stage()),
                 "r"(tile.query_block), "r"(tile.head), "r"(tile.batch), "r"(tile.split)
                 : "memory");
    mbarrier_arrive(full + 8 * state.stage());
    state.advance();
  }

  FA3_DEVICE TileCoord look() const {
    TileCoord tile;
    mbarrier_wait(full + 8 * state.stage(), state.parity());
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.query_block), "=r"(tile.head), "=r"(tile.batch), "=r"(tile.split)
                 : "r"(slots + 16 * state.stage())
                 : "memory");
    return tile;
  }

  // One arrival of each warp that looks at it empties a slot.
  FA3_DEVICE void pass() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * state.stage());
    state.advance();
  }

  FA3_DEVICE TileCoord receive() {
    TileCoord tile = look();
    pass();
    return tile;
  }
};

}  // namespace fa3
