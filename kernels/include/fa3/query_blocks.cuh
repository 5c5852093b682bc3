// The query blocks that a KV block meets in the backward: closed-form bounds of its queries, or as
// listed at run time.
#pragma once
#include "fa3/block_map.cuh"

namespace fa3 {

// Queries [begin, end) hold everything that sees a key of the KV block; each of
// [full_begin, full_end) sees all of them, so that those blocks run without the mask.
struct QueryBounds {
  int begin, end, full_begin, full_end;
};

// What the backward asks of a variant beside the forward's.
template <class AuxT>
struct PlainBackward : PlainVariant<AuxT> {
  using At = Site<AuxT>;
  static constexpr bool kDerivative = false;  // derivative() is not 1
  static constexpr bool kFindDead = false;    // rows without a key have to be told
  static constexpr bool kTileGradient = false;  // dS is the gradient of the dense (q, kv) input,
  static constexpr bool kTileSum = false;       // to which several heads or batches add
  static constexpr float kFactor = 1.0f;      // of d score / d s, the constant one
  static constexpr bool kTwoWeights = false;  // weight() is kKept where kept() holds, or kDropped
  static constexpr float kKept = 1.0f, kDropped = 0.0f;

  // d score / d s divided by kFactor; `s` is the product as the tensor cores give it.
  FA3_DEVICE static float derivative(float s, const At&, const auto&, const auto&, const auto&,
                                     int q, int kv, float tile) {
    return 1.0f;
  }
  FA3_DEVICE static bool kept(const At&, const auto&, const auto&, const auto&, int q, int kv,
                              auto number) {
    return true;
  }
  // The dense (q, kv) input where it does not come by TMA.
  FA3_DEVICE static float dense(const At&, const auto&, const auto&, const auto&, int q, int kv,
                                float tile) {
    return 0.0f;
  }
  FA3_DEVICE static QueryBounds query_bounds(const At& at, int kv_begin, int kv_end) {
    return {0, at.queries, 0, at.queries};
  }
};

struct QuerySequence {
  int count;                // query blocks in all
  int first;                // where bounds are in closed form: they ascend from here,
  int full_begin, full_end; // and those in between need no mask
  const int* list;          // or the listed blocks: `partial` from the front, the others from the
  int partial, list_end;    // back

  FA3_DEVICE int block(int i) const {
    if (list == nullptr) return first + i;
    return __ldg(list + (i < partial ? i : list_end - (i - partial)));
  }
  FA3_DEVICE bool masked(int i, int block) const {
    if (list != nullptr) return i < full_begin;
    return block < full_begin || block >= full_end;
  }
};

// Rows past the last query have an LSE of infinity, so that a block may hold some and be full;
// keys past the last one have to be masked.
template <class Variant, int BlockM, int BlockN>
FA3_DEVICE QuerySequence query_sequence(const typename Variant::At& at, const BlockMap& map,
                                        int kv_block) {
  int kv_begin = kv_block * BlockN, kv_end = kv_begin + BlockN;
  bool cut = kv_end > at.keys;
  QuerySequence seq;
  if constexpr (Variant::kBlockMap) {
    int row = at.batch * map.batch_stride + at.head * map.head_stride + kv_block;
    int2 counts = __ldg(map.counts + row);
    seq.partial = counts.x;
    seq.count = counts.x + counts.y;
    seq.list = map.indices + static_cast<int64_t>(row) * map.blocks;
    seq.list_end = map.blocks - 1;
    seq.full_begin = cut ? seq.count : counts.x;
    seq.first = seq.full_end = 0;
  } else {
    QueryBounds bounds = Variant::query_bounds(at, kv_begin, min(kv_end, at.keys));
    int begin = max(bounds.begin, 0), end = min(bounds.end, at.queries);
    seq.first = begin / BlockM;
    seq.count = begin < end ? ceil_div(end, BlockM) - seq.first : 0;
    seq.full_begin = ceil_div(max(bounds.full_begin, 0), BlockM);
    bool to_the_end = bounds.full_end >= at.queries;
    seq.full_end = to_the_end ? ceil_div(at.queries, BlockM) : max(bounds.full_end, 0) / BlockM;
    if (cut) seq.full_end = 0;
    seq.list = nullptr;
    seq.partial = seq.list_end = 0;
  }
  return seq;
}

}  // namespace fa3
