// Lists the key blocks of every query block before the attention kernel runs, for masks that read
// tensors.
//
// IntervalBlockMap: a tensor's values over a block of queries or keys are an interval, its least
// and greatest; the mask evaluated on intervals says empty, partial or full. One pass over each row
// of the tensors (documents, padding), never over queries x keys. The variant provides
//   MapValue                                 int, int64_t or double
//   kMapValues                               how many values the mask reads along an axis
//   MapValue map_query(at, i, q), map_key(at, i, kv)    value i of a row or of a column
//   int classify(at, queries, keys, q, kv)   kEmpty, kPartial or kFull, from Interval[kMapValues]
//                                            and the intervals of the indices themselves
//
// DenseBlockMap: the mask itself is a (query, key) tensor; each of its elements is looked at once,
// until a block has both a seen and an unseen one.
#pragma once
#include "fa3/block_map.cuh"

namespace fa3 {

enum Occupancy { kEmpty, kPartial, kFull };

template <class T>
struct Interval {
  T low, high;  // both included
};

template <class AuxT>
struct BlockMapParams {
  int* indices;
  int2* counts;
  int batches, heads;  // 1 where the mask broadcasts
  int query_blocks, blocks;
  int rows;  // queries of a query block
  int queries, keys;
  AuxT aux;
};

// The interval that holds nothing.
FA3_DEVICE void reset(Interval<int>& x) { x = {0x7fffffff, -0x7fffffff - 1}; }
FA3_DEVICE void reset(Interval<int64_t>& x) {
  x = {0x7fffffffffffffffll, -0x7fffffffffffffffll - 1};
}
FA3_DEVICE void reset(Interval<double>& x) { x = {inf(), -inf()}; }

template <class T>
FA3_DEVICE void include(Interval<T>& x, T value) {
  x.low = least(x.low, value);
  x.high = largest(x.high, value);
}
FA3_DEVICE void include(Interval<double>& x, double value) {
  if (value != value) x = {-inf(), inf()};  // compares with nothing: anything may come out
  x.low = value < x.low ? value : x.low;
  x.high = value > x.high ? value : x.high;
}

// Over a warp; every lane gets it.
FA3_DEVICE Interval<int> united(const Interval<int>& x) {
  return {__reduce_min_sync(~0u, x.low), __reduce_max_sync(~0u, x.high)};
}
template <class T>
FA3_DEVICE Interval<T> united(Interval<T> x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x.low = least(x.low, __shfl_xor_sync(~0u, x.low, lanes));
    x.high = largest(x.high, __shfl_xor_sync(~0u, x.high, lanes));
  }
  return x;
}
// Ids are mostly small numbers: 2 instructions in place of 20 shuffles.
FA3_DEVICE Interval<int64_t> united(const Interval<int64_t>& x) {
  int low = static_cast<int>(x.low), high = static_cast<int>(x.high);
  if (!__all_sync(~0u, low == x.low && high == x.high)) return united<int64_t>(x);
  Interval<int> y = united(Interval<int>{low, high});
  return {y.low, y.high};
}

// Appends the blocks chunk .. chunk + 31, one a lane, to the lists of a query block.
struct BlockList {
  int* list;
  int blocks;
  int partial = 0, full = 0;

  FA3_DEVICE void append(int block, int kind) {
    uint32_t before = (1u << threadIdx.x % 32) - 1;
    uint32_t partials = __ballot_sync(~0u, kind == kPartial);
    uint32_t fulls = __ballot_sync(~0u, kind == kFull);
    if (kind == kPartial) list[partial + __popc(partials & before)] = block;
    if (kind == kFull) list[blocks - 1 - full - __popc(fulls & before)] = block;
    partial += __popc(partials);
    full += __popc(fulls);
  }
};

template <class Variant, int BlockN>
struct IntervalBlockMap {
  using At = typename Variant::At;
  using Params = BlockMapParams<typename Variant::Aux>;
  using Values = Interval<typename Variant::MapValue>;
  static constexpr int kWarps = 16;
  static constexpr int kRows = kWarps;  // query blocks of a thread block, one a warp
  static constexpr int kAhead = 4;      // key blocks whose values a warp reads at once
  static constexpr int kValues = Variant::kMapValues;
  static constexpr int kChunk = 512;  // key blocks whose intervals are in shared memory at a time

  FA3_DEVICE static void query_extent(const At& at, const Interval<int>& q,
                                      Values (&out)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      Values x;
      reset(x);
      for (int row = q.low + threadIdx.x % 32; row <= q.high; row += 32)
        include(x, Variant::map_query(at, i, row));
      out[i] = united(x);
    }
  }

  // Of key blocks first .. first + kAhead - 1; past `last`, that one again. Nothing waits for the
  // values of one block before those of the next are asked for.
  FA3_DEVICE static void key_extents(const At& at, int first, int last,
                                     Values (&out)[kAhead][kValues]) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      int begin = min(first + a, last) * BlockN, end = min(begin + BlockN, at.keys);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        reset(out[a][i]);
#pragma unroll
        for (int kv = 0; kv < BlockN; kv += 32)
          include(out[a][i],
                  Variant::map_key(at, i, min(begin + kv + static_cast<int>(threadIdx.x % 32),
                                              end - 1)));
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) out[a][i] = united(out[a][i]);
    }
  }

  // Grid (ceil(query blocks / kRows), heads, batches).
  FA3_DEVICE static void run(const Params& p) {
    __shared__ Values keys[kChunk][kValues];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int query_block = blockIdx.x * kRows + warp;
    At at{p.aux, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y), p.queries, p.keys};
    Interval<int> q{query_block * p.rows, min(query_block * p.rows + p.rows, p.queries) - 1};
    Values rows[kValues];
    query_extent(at, q, rows);
    int64_t row = (static_cast<int64_t>(blockIdx.z) * p.heads + blockIdx.y) * p.query_blocks +
                  query_block;
    BlockList out{p.indices + row * p.blocks, p.blocks};
    for (int chunk = 0; chunk < p.blocks; chunk += kChunk) {
      int count = min(kChunk, p.blocks - chunk);
      __syncthreads();
      for (int i = warp * kAhead; i < count; i += kWarps * kAhead) {
        Values values[kAhead][kValues];
        key_extents(at, chunk + i, chunk + count - 1, values);
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
#pragma unroll
          for (int v = 0; v < kValues; ++v)
            if (lane == 0 && i + a < count) keys[i + a][v] = values[a][v];
        }
      }
      __syncthreads();
      if (query_block >= p.query_blocks) continue;
      for (int base = 0; base < count; base += 32) {
        int i = base + lane;
        int kind = kEmpty;
        if (i < count) {
          int first = (chunk + i) * BlockN;
          Interval<int> kv{first, min(first + BlockN, p.keys) - 1};
          kind = Variant::classify(at, rows, keys[i], q, kv);
          // A block that reaches past the keys needs the mask.
          if (kind == kFull && first + BlockN > p.keys) kind = kPartial;
        }
        out.append(chunk + i, kind);
      }
    }
    if (query_block < p.query_blocks && lane == 0)
      p.counts[row] = make_int2(out.partial, out.full);
  }
};

template <class Variant, int BlockN>
struct DenseBlockMap {
  using At = typename Variant::At;
  using Params = BlockMapParams<typename Variant::Aux>;
  static constexpr int kWarps = 8;
  static constexpr int kRows = 1;  // query blocks of a thread block, whose warps share its blocks
  static constexpr int kChunk = 1024;

  FA3_DEVICE static int classify(const At& at, int q_first, int q_last, int first, int last) {
    auto head = Variant::head(at);
    bool seen = false, unseen = false;
    for (int q = q_first; q < q_last; ++q) {
      auto row = Variant::row(at, head, q);
      for (int kv = first + threadIdx.x % 32; kv < last; kv += 32) {
        bool here = sees<Variant>(at, head, row, Variant::col(at, head, kv), q, kv);
        seen = seen || here;
        unseen = unseen || !here;
      }
      if (q % 8 == 7 && __any_sync(~0u, seen) && __any_sync(~0u, unseen)) return kPartial;
    }
    seen = __any_sync(~0u, seen);
    unseen = __any_sync(~0u, unseen);
    return seen ? (unseen ? kPartial : kFull) : kEmpty;
  }

  // Grid (query blocks, heads, batches).
  FA3_DEVICE static void run(const Params& p) {
    __shared__ int kinds[kChunk];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int query_block = blockIdx.x;
    At at{p.aux, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y), p.queries, p.keys};
    int q_first = query_block * p.rows, q_last = min(q_first + p.rows, p.queries);
    int64_t row = (static_cast<int64_t>(blockIdx.z) * p.heads + blockIdx.y) * p.query_blocks +
                  query_block;
    BlockList out{p.indices + row * p.blocks, p.blocks};
    for (int chunk = 0; chunk < p.blocks; chunk += kChunk) {
      int count = min(kChunk, p.blocks - chunk);
      __syncthreads();
      for (int i = warp; i < count; i += kWarps) {
        int first = (chunk + i) * BlockN, last = min(first + BlockN, p.keys);
        int kind = classify(at, q_first, q_last, first, last);
        if (kind == kFull && first + BlockN > p.keys) kind = kPartial;
        if (lane == 0) kinds[i] = kind;
      }
      __syncthreads();
      if (warp > 0) continue;
      for (int base = 0; base < count; base += 32)
        out.append(chunk + base + lane, base + lane < count ? kinds[base + lane] : kEmpty);
    }
    if (threadIdx.x == 0) p.counts[row] = make_int2(out.partial, out.full);
  }
};

}  // namespace fa3
