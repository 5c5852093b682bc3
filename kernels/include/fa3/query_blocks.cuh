// The query blocks that a KV block meets in the backward: closed-form bounds of its queries.
#pragma once
#include "fa3/variant.cuh"

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
  static constexpr float kFactor = 1.0f;      // of d score / d s, the constant one

  // d score / d s divided by kFactor; `s` is the product as the tensor cores give it.
  FA3_DEVICE static float derivative(float s, const At&, const auto&, const auto&, const auto&,
                                     int q, int kv, float tile) {
    return 1.0f;
  }
  FA3_DEVICE static QueryBounds query_bounds(const At& at, int kv_begin, int kv_end) {
    return {0, at.queries, 0, at.queries};
  }
};

struct QuerySequence {
  int first, count;           // query blocks, in ascending order
  int full_begin, full_end;   // those that need no mask

  FA3_DEVICE bool masked(int block) const { return block < full_begin || block >= full_end; }
};

// Rows past the last query have an LSE of infinity, so that a block may hold some and be full;
// keys past the last one have to be masked.
template <class Variant, int BlockM, int BlockN>
FA3_DEVICE QuerySequence query_sequence(const typename Variant::At& at, int kv_block) {
  int kv_begin = kv_block * BlockN, kv_end = kv_begin + BlockN;
  QueryBounds bounds = Variant::query_bounds(at, kv_begin, min(kv_end, at.keys));
  int begin = max(bounds.begin, 0), end = min(bounds.end, at.queries);
  QuerySequence seq;
  seq.first = begin / BlockM;
  seq.count = begin < end ? ceil_div(end, BlockM) - seq.first : 0;
  seq.full_begin = ceil_div(max(bounds.full_begin, 0), BlockM);
  bool to_the_end = bounds.full_end >= at.queries;
  seq.full_end = to_the_end ? ceil_div(at.queries, BlockM) : max(bounds.full_end, 0) / BlockM;
  if (kv_end > at.keys) seq.full_end = 0;
  return seq;
}

}  // namespace fa3
