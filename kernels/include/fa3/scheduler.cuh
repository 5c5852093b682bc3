// Which tile (query block of a head) a persistent block works on next.
#pragma once
#include "fa3/mbarrier.cuh"

namespace fa3 {

struct TileCoord {
  int query_block, head, batch;
};

// Tiles of equal work go round the grid in order, query blocks of a head side by side so that its
// keys stay in L2. Unequal ones are taken from a counter, longest first (the last query block of a
// causal head), in sections of `section` heads whose keys and values fit L2 together.
struct TileOrder {
  int tiles, query_blocks, heads, section;
  int* next;  // one counter, zero between launches; only the unequal case uses it

  template <bool LongestFirst>
  FA3_DEVICE TileCoord coord(int tile) const {
    if constexpr (LongestFirst) {
      int section_tiles = section * query_blocks;
      int which = tile / section_tiles;
      int inside = tile - which * section_tiles;
      int width = min(section, tiles / query_blocks - which * section);
      int rank = inside / width;
      int head = which * section + inside - rank * width;
      int batch = head / heads;
      return {query_blocks - 1 - rank, head - batch * heads, batch};
    } else {
      int head = tile / query_blocks;
      int batch = head / heads;
      return {tile - head * query_blocks, head - batch * heads, batch};
    }
  }

  // Each block takes one tile past the end; the last of them to do so leaves the counter at zero
  // for the next launch.
  FA3_DEVICE int take() const {
    int taken = atomicAdd(next, 1);
    if (taken == tiles - 1) *next = 0;
    return taken + gridDim.x;
  }
};

}  // namespace fa3
