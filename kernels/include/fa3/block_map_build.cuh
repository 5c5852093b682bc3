// Lists the key blocks of every query block before the attention kernel runs, for masks that read
// tensors (documents, padding). A tensor's values over a block are an interval, its least and
// greatest; the mask evaluated on intervals says empty, partial or full. One pass over each row of
// the tensors, never over queries x keys.
//
// The variant provides
//   kMapValues                               how many values the mask reads along an axis
//   int map_query(at, i, q), map_key(at, i, kv)    value i of a row or of a column
//   int classify(at, queries, keys, q, kv)   kEmpty, kPartial or kFull, from Interval[kMapValues]
//                                            and the intervals of the indices themselves
#pragma once
#include "fa3/block_map.cuh"

namespace fa3 {

enum Occupancy { kEmpty, kPartial, kFull };

struct Interval {
  int low, high;  // both included
};

template <class AuxT>
struct BlockMapParams {
  int* indices;
  int2* counts;
  int batches, heads;  // 1 where the mask broadcasts
  int query_blocks, blocks;
  int queries, keys;
  AuxT aux;
};

template <class Variant, int BlockM, int BlockN>
struct BlockMapBuilder {
  using At = typename Variant::At;
  using Params = BlockMapParams<typename Variant::Aux>;
  static constexpr int kWarps = 8;
  static constexpr int kValues = Variant::kMapValues;
  static constexpr int kChunk = 512;  // key blocks whose intervals are in shared memory at a time

  // The intervals of values first .. last - 1 along one axis; every lane of the warp gets them.
  template <bool Query>
  FA3_DEVICE static void extent(const At& at, int first, int last, Interval (&out)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      int low = 0x7fffffff, high = -0x7fffffff - 1;
      for (int x = first + threadIdx.x % 32; x < last; x += 32) {
        int value = Query ? Variant::map_query(at, i, x) : Variant::map_key(at, i, x);
        low = min(low, value);
        high = max(high, value);
      }
      out[i] = {__reduce_min_sync(~0u, low), __reduce_max_sync(~0u, high)};
    }
  }

  // One warp a query block; grid (ceil(query blocks / kWarps), heads, batches).
  FA3_DEVICE static void run(const Params& p) {
    __shared__ Interval keys[kChunk][kValues];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int query_block = blockIdx.x * kWarps + warp;
    At at{p.aux, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y), p.queries, p.keys};
    Interval q{query_block * BlockM, min(query_block * BlockM + BlockM, p.queries) - 1};
    Interval rows[kValues];
    extent<true>(at, q.low, q.high + 1, rows);
    int64_t row = (static_cast<int64_t>(blockIdx.z) * p.heads + blockIdx.y) * p.query_blocks +
                  query_block;
    int* list = p.indices + row * p.blocks;
    int partial = 0, full = 0;
    for (int chunk = 0; chunk < p.blocks; chunk += kChunk) {
      int count = min(kChunk, p.blocks - chunk);
      __syncthreads();
      for (int i = warp; i < count; i += kWarps) {
        int first = (chunk + i) * BlockN;
        Interval values[kValues];
        extent<false>(at, first, min(first + BlockN, p.keys), values);
        if (lane == 0) {
#pragma unroll
          for (int v = 0; v < kValues; ++v) keys[i][v] = values[v];
        }
      }
      __syncthreads();
      if (query_block >= p.query_blocks) continue;
      for (int base = 0; base < count; base += 32) {
        int i = base + lane;
        int kind = kEmpty;
        if (i < count) {
          int first = (chunk + i) * BlockN;
          Interval kv{first, min(first + BlockN, p.keys) - 1};
          kind = Variant::classify(at, rows, keys[i], q, kv);
          // A block that reaches past the keys needs the mask.
          if (kind == kFull && first + BlockN > p.keys) kind = kPartial;
        }
        uint32_t before = (1u << lane) - 1;
        uint32_t partials = __ballot_sync(~0u, kind == kPartial);
        uint32_t fulls = __ballot_sync(~0u, kind == kFull);
        if (kind == kPartial) list[partial + __popc(partials & before)] = chunk + i;
        if (kind == kFull) list[p.blocks - 1 - full - __popc(fulls & before)] = chunk + i;
        partial += __popc(partials);
        full += __popc(fulls);
      }
    }
    if (query_block < p.query_blocks && lane == 0) p.counts[row] = make_int2(partial, full);
  }
};

}  // namespace fa3
