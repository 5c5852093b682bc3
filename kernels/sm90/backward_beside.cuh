// What warps of the backward that have nothing to load do while others compute, of heads that are
// worked in sections (TileOrder): row terms and cleared sums of the section that comes next, and with
// Config::kBehind dQ of the one that was worked before. So O is read, and sums are cleared, rounded and
// gone, near the time at which their head's queries are in L2. The first section's rows and the last
// one's dQ are left to kernels before and after (fa3/backward_rows.cuh).
//
// Blocks wait only for what running ones have taken, so that it does not matter how many run at once:
// items and tiles are taken from counters, and each needs only what comes before it in
//   rows of section 1 | rows of 2, tiles of 0 | rows of 3, tiles of 1, dQ of 0 | ...
#pragma once
#include "fa3/backward_rows.cuh"
#include "fa3/progress.cuh"
#include "fa3/tma.cuh"

namespace fa3 {

template <class Block>
struct HeadsBeside {
  using Config = typename Block::Config;
  using Variant = typename Block::Variant;
  using Dtype = typename Config::Dtype;
  using Rows = RowTerms<Config, Variant>;
  using Params = typename Block::Params;
  static constexpr int kItems = 4;  // of a query block: what a warp does at a time
  static constexpr int kKinds = Config::kBehind ? 2 : 1;
  static_assert(!Config::kAhead || (Config::kLongestFirst && !Config::kFinishes), "sections");

  const Block& block;
  const Params& p;

  // Items of a kind for each KV head.
  FA3_DEVICE static int of_head(const Params& p) { return kItems * p.group * p.query_blocks; }

  // Few registers are left to a warp beside the producer: what can be computed anew is not kept.
  FA3_DEVICE static int lane() {
    int thread = threadIdx.x;
    forget(thread);
    return thread % 32;
  }

  FA3_DEVICE void run() const {
    for (;;) {
      uint32_t item = 0;
      if (lane() == 0) item = atomicAdd(block.pieces_taken(), 1);
      item = __shfl_sync(~0u, item, 0);
      uint32_t head = item / of_head(p), cycle = head / (kKinds * p.order.section);
      int position = head - cycle * (kKinds * p.order.section);
      int index = item - head * of_head(p);
      int begun = cycle * p.order.section;  // of the section that is worked meanwhile
      if (begun >= heads()) break;
      if (position < p.order.section) {
        position += begun + p.order.section;
        if (position < heads()) prepare(position, index, begun);
      } else {
        position += begun - 2 * p.order.section;
        if (Config::kBehind && position >= 0) round(position, index);
      }
    }
  }

 private:
  FA3_DEVICE int heads() const { return p.order.tiles / p.order.query_blocks; }

  // Row terms of a quarter of a query block, and as much of its sums.
  FA3_DEVICE void prepare(int position, int index, int begun) const {
    if (lane() == 0) await(p.order.next, begun * p.order.query_blocks);
    __syncwarp();
    const auto& before = p.before;
    int row = index / kItems, first = index % kItems * (Rows::kM / kItems);
    int batch = position / p.order.heads;
    int head = (position - batch * p.order.heads) * p.group;
    if constexpr (Config::kGrouped) head += row / p.query_blocks, row %= p.query_blocks;
    int64_t place = block.block_index(row, head, batch);
    float4* sums = reinterpret_cast<float4*>(before.dq_sums + place * Config::kSumFloats) +
                   index % kItems * (Config::kSumFloats / kItems / 4) + lane();
#pragma unroll 1
    for (int i = 0; i < Config::kSumFloats / kItems / 4; i += 32)
      sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float* terms = before.rows + place * kRowTerms<Variant> * Rows::kM;
    constexpr int at_once = 32 / Rows::kLanes;
    typename Variant::At at{p.aux, batch, head, p.queries, p.keys};
    row = row * Rows::kM;
    prefetch(row + first, head, batch);
#pragma unroll 1
    for (int i = first + lane() / Rows::kLanes; i < first + Rows::kM / kItems; i += at_once)
      Rows::one(before, at, terms, i, row + i, lane() % Rows::kLanes);
    __syncwarp();
    if (lane() == 0) signal(block.prepared(position));
  }

  // The item's rows of O and dO to L2: a lane a row.
  FA3_DEVICE void prefetch(int q, int head, int batch) const {
    q += lane() % 16;
    for (int i = 0; i < Rows::kM / kItems; i += 16, q += 16) {
      if (q >= p.queries) break;
      const char* from = lane() < 16 ? p.before.out + 2 * p.before.out_at.at(batch, head, q)
                                     : p.before.dout + 2 * p.before.dout_at.at(batch, head, q);
      bulk_prefetch(from, 2 * Config::kDimV);
    }
  }

  // dQ of the queries of a warp, from each warpgroup's sums.
  FA3_DEVICE void round(int position, int index) const {
    if (lane() == 0) await(block.finished(position), p.order.query_blocks);
    __syncwarp();
    int row = index / kItems, band = index % kItems;
    int batch = position / p.order.heads;
    int head = (position - batch * p.order.heads) * p.group;
    if constexpr (Config::kGrouped) head += row / p.query_blocks, row %= p.query_blocks;
    const float* sums =
        p.dq_sums + static_cast<int64_t>(block.block_index(row, head, batch)) * Config::kSumFloats;
    int own = lane();
#pragma unroll 1
    for (int part = 0; part < Config::kWarpgroups; ++part) {
      int columns = part + 1 < Config::kWarpgroups ? Config::kFirstColumns : Config::kLastColumns;
      const float* from = sums + part * Config::kFirstColumns * 64 + band * columns * 16;
      if (own == 0) bulk_prefetch(from, columns * 64);
      from += own * 4;
      int q = row * Config::kBlockM + Config::sum_row(part) + band * 16 + own / 4 + own % 2 * 8;
      char* to = p.dq + 2 * (p.dq_at.at(batch, head, q) + Config::sum_column(part) + own % 4 / 2 * 8);
#pragma unroll 1
      for (int j = 0; j < columns; j += 16, from += 256, to += 32) {
        uint32_t y[4];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float4 z = __ldcg(reinterpret_cast<const float4*>(from) + 32 * k);
          y[2 * k] = pack<Dtype>(z.x * Variant::kFactor, z.y * Variant::kFactor);
          y[2 * k + 1] = pack<Dtype>(z.z * Variant::kFactor, z.w * Variant::kFactor);
        }
        lane_transpose(y, own % 4, 1);
        store_if(q < p.queries, to, y);
      }
    }
  }
};

}  // namespace fa3
