// The lists of query blocks of every KV block, from the kernels that list key blocks for query
// blocks: queries and keys change places.
#pragma once
#include "fa3/block_map_build.cuh"
#include "fa3/query_blocks.cuh"

namespace fa3 {

// `queries` of its sites are keys, and `keys` are queries.
template <class Variant>
struct Turned : PlainVariant<typename Variant::Aux> {
  using At = typename Variant::At;
  static constexpr bool kMask = true;

  FA3_DEVICE static At turned(const At& at) {
    return {at.aux, at.batch, at.head, at.keys, at.queries};
  }
  FA3_DEVICE static auto head(const At& at) { return Variant::head(turned(at)); }
  FA3_DEVICE static bool mask(const At& at, const auto& head, const auto&, const auto&, int kv,
                              int q, float) {
    At site = turned(at);
    return sees<Variant>(site, head, Variant::row(site, head, q), Variant::col(site, head, kv), q,
                         kv);
  }
};

template <class Variant>
struct TurnedIntervals : Turned<Variant> {
  using At = typename Variant::At;
  using MapValue = typename Variant::MapValue;
  using Values = const Interval<MapValue>*;
  static constexpr int kMapValues = Variant::kMapValues;

  FA3_DEVICE static MapValue map_query(const At& at, int i, int kv) {
    return Variant::map_key(Turned<Variant>::turned(at), i, kv);
  }
  FA3_DEVICE static MapValue map_key(const At& at, int i, int q) {
    return Variant::map_query(Turned<Variant>::turned(at), i, q);
  }
  FA3_DEVICE static int classify(const At& at, Values keys, Values queries, Interval<int> kv,
                                 Interval<int> q) {
    return Variant::classify(Turned<Variant>::turned(at), queries, keys, q, kv);
  }
};

}  // namespace fa3
