// Which tile (query block of a head) a persistent block works on next.
#pragma once
#include "fa3/mbarrier.cuh"

namespace fa3 {

struct TileCoord {
  int query_block;  // -1: no tile
  int head, batch, split;
};

constexpr __device__ TileCoord kNoTile{-1, 0, 0, 0};

// Tiles of equal work go round the grid in order, query blocks of a head side by side so that its
// keys stay in L2. Unequal ones are taken from a counter, longest first (the last query block of a
// causal head), in sections of `section` heads whose keys and values fit L2 together. A split of the
// keys makes `splits` tiles of each.
struct TileOrder {
  int tiles, query_blocks, heads, section, splits;
  int stride;  // blocks of the grid
  int* next;   // one counter, zero between launches; only the unequal case uses it

  template <bool LongestFirst, bool Split = false>
  FA3_DEVICE TileCoord coord(uint32_t tile) const {
    static_assert(!(LongestFirst && Split), "parts of tiles are of one length");
    uint32_t per_head = query_blocks;
    uint32_t head, query_block, split = 0;
    if constexpr (LongestFirst) {
      uint32_t per_section = section * per_head;
      uint32_t first = tile / per_section * section;
      uint32_t inside = tile % per_section;
      uint32_t width = min(static_cast<uint32_t>(section), tiles / per_head - first);
      uint32_t rank = inside / width;
      head = first + inside - rank * width;
      query_block = per_head - 1 - rank;
    } else {
      head = tile / per_head;
      query_block = tile - head * per_head;
      if constexpr (Split) {
        uint32_t part = head;
        head = part / splits;
        split = part - head * splits;
      }
    }
    uint32_t batch = head / heads;
    return {static_cast<int>(query_block), static_cast<int>(head - batch * heads),
            static_cast<int>(batch), static_cast<int>(split)};
  }
};

// The same where a block takes its first tile from the counter too, so that none waits for a tile
// that has no block yet.
struct TakenTiles {
  int index;
  int taken = 0;

  FA3_DEVICE void take(const TileOrder& order) { taken = atomicAdd(order.next, 1); }
  FA3_DEVICE void next(const TileOrder&) { index = taken; }
};

// The sequence of tile numbers of one block. Dynamic: each takes from the counter; the answer is
// looked at only in next(), so that its latency hides behind the loads of the tile in between.
template <bool Dynamic>
struct TileQueue {
  int index = blockIdx.x;
  int taken = 0;

  FA3_DEVICE void take(const TileOrder& order) {
    if (Dynamic) taken = atomicAdd(order.next, 1);
  }

  // Each block takes one tile past the end; the last of them to do so leaves the counter at zero
  // for the next launch.
  FA3_DEVICE void next(const TileOrder& order) {
    if (Dynamic && taken == order.tiles - 1) *order.next = 0;
    index = order.stride + (Dynamic ? taken : index);
  }
};

}  // namespace fa3
