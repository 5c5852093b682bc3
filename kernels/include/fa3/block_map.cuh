// The key blocks of one query block, in the order in which they are worked: from right to left,
// or as listed at run time. Producer and consumers walk the same sequence.
#pragma once
#include "fa3/variant.cuh"

namespace fa3 {

// Lists built before the launch: for each (batch, head, query block) the partial blocks from the
// front of a row of `blocks` entries and the full ones from its back. A stride of 0 broadcasts.
struct BlockMap {
  const int* indices;
  const int2* counts;  // {partial, full}
  int batch_stride, head_stride;  // in query blocks
  int blocks;
};

struct BlockSequence {
  int count;        // key blocks in all
  int masked;       // how many come first and need the mask
  int full;         // how many follow that do not; after them, masked ones again
  int first;        // right-most block, where bounds are in closed form
  const int* list;  // or the listed blocks
  int list_end;

  FA3_DEVICE int block(int i) const {
    if (list == nullptr) return first - i;
    return __ldg(list + (i < masked ? i : list_end - (i - masked)));
  }

  // The i-th of n parts of nearly equal length.
  FA3_DEVICE BlockSequence part(int i, int n) const {
    int least = count / n, longer = count % n, begin = i * least + min(i, longer);
    BlockSequence x;
    x.count = least + (i < longer ? 1 : 0);
    x.masked = min(max(masked - begin, 0), x.count);
    x.full = min(max(masked + full - begin, 0), x.count) - x.masked;
    x.first = first - begin;
    x.list = list == nullptr ? list : list + begin;
    x.list_end = list_end - 2 * begin - x.masked + masked;
    return x;
  }
};

// The blocks of queries [q_begin, q_end), which are `query_block` of the lists.
// Closed-form bounds are kept within key blocks [least, limit), so that the blocks of some rows of
// a tile are some of the tile's, whatever the bounds of fewer rows may be.
template <class Variant, int BlockN>
FA3_DEVICE BlockSequence block_sequence(const typename Variant::At& at, const BlockMap& map,
                                        int query_block, int q_begin, int q_end, int least = 0,
                                        int limit = 0x7fffffff) {
  BlockSequence seq;
  if constexpr (Variant::kBlockMap) {
    int row = at.batch * map.batch_stride + at.head * map.head_stride + query_block;
    int2 counts = __ldg(map.counts + row);
    seq.masked = counts.x;
    seq.full = counts.y;
    seq.count = counts.x + counts.y;
    seq.list = map.indices + static_cast<int64_t>(row) * map.blocks;
    seq.list_end = map.blocks - 1;
    seq.first = 0;
  } else {
    KeyBounds keys = Variant::bounds(at, q_begin, q_end);
    int first_key = max(keys.begin, 0), last_key = min(keys.end, at.keys);
    int begin = max(first_key / BlockN, least);
    int end = first_key < last_key ? min(ceil_div(last_key, BlockN), limit) : begin;
    int full_begin = max(ceil_div(max(min(keys.full_begin, at.keys), 0), BlockN), begin);
    // The last block may reach past the keys and is masked then.
    int full_end = min(max(min(keys.full_end, at.keys), 0) / BlockN, end);
    seq.count = max(end - begin, 0);
    seq.full = max(full_end - full_begin, 0);
    seq.masked = seq.full > 0 ? end - full_end : seq.count;
    seq.first = end - 1;
    seq.list = nullptr;
    seq.list_end = 0;
  }
  return seq;
}

}  // namespace fa3
