// A table of Variant::by_distance for every kv - q that there is, which the scores of the attention
// kernel begin with.
#pragma once
#include "fa3/variant.cuh"

namespace fa3 {

template <class Aux>
struct DistanceTableParams {
  float* table;  // (batches, heads, queries + keys - 1), each of the first two 1 where it is the same
  int heads, queries, keys;
  Aux aux;
};

template <class Variant>
struct DistanceTable {
  using Params = DistanceTableParams<typename Variant::Aux>;
  static constexpr int kThreads = 256;

  // Where distance 0 is.
  FA3_DEVICE static int64_t zero(const typename Variant::At& at, int heads) {
    int64_t own = Variant::kTableOfBatch ? at.batch : 0;
    if constexpr (Variant::kTableOfHead) own = own * heads + at.head;
    return own * (at.queries + at.keys - 1) + at.queries - 1;
  }

  // Grid (runs of distances, heads, batches).
  FA3_DEVICE static void run(const Params& p) {
    typename Variant::At at{p.aux, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y),
                            p.queries, p.keys};
    int distance = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) + 1 - p.queries;
    if (distance >= p.keys) return;
    float x = Variant::by_distance(at, distance);
    p.table[zero(at, p.heads) + distance] = fabsf(x) < kHuge ? x / Variant::kUnit : x;
  }
};

}  // namespace fa3
