// What the consumers of a backward do for other heads between two tiles, while keys and values are on
// their way. Heads are worked in sections (TileOrder). Each tile has a share of a head of the next
// section, whose row terms it computes and whose sums it clears as it begins, and of one of the section
// before, whose dQ it rounds as it ends. So O, dO and the sums pass through memory beside products. The
// first section's rows and the last one's dQ are left to kernels before and after
// (fa3/backward_rows.cuh).
//
// Tiles are taken in order from a counter, by blocks that run, and shares wait only for what tiles
// taken before have done: it does not matter how many blocks run at once.
#pragma once
#include "fa3/backward_rows.cuh"
#include "fa3/progress.cuh"

namespace fa3 {

template <class Block>
struct HeadsBeside {
  using Config = typename Block::Config;
  using Variant = typename Block::Variant;
  using Rows = RowTerms<Config, Variant>;
  using Gradient = QueryGradient<Config, Variant>;
  using Params = typename Block::Params;
  static constexpr int kM = Rows::kM, kWarps = 4 * Config::kWarpgroups;
  // In rows of a query block that a warp has, a step for each time that it is read: a row's pieces
  // are of kLanes lanes.
  static constexpr int kRows = kM / kWarps, kAtOnce = 32 / Rows::kLanes;
  static constexpr int kSteps = kRows < kAtOnce ? 1 : kRows / kAtOnce;
  static_assert(!Config::kBeside || (Config::kLongestFirst && !Config::kFinishes), "sections");
  static_assert(!Config::kBeside || (!Variant::kWideScores && !Variant::kFindDead), "row terms");

  const Block& block;
  const Params& p;

  // The tile that was worked last, its head and KV block, in shared memory: registers are scarce in
  // between.
  FA3_DEVICE uint32_t last() const { return block.shared + Block::kAtLast + 8 * (thread() / 32); }
  FA3_DEVICE void start() const {
    if (thread() % 32 == 0) set_shared(last(), -1);
    __syncwarp();
  }

  // ---- the producer ----

  // Before it publishes a tile, until what the tile before that has a share of is there; gives `next`.
  FA3_DEVICE int await_worked(int last, int next) const {
    if (last >= p.order.section) await(block.finished(last - p.order.section), signals());
    return next;
  }
  // Before it loads a tile's queries.
  FA3_DEVICE void await_rows(int position) const {
    if (position < p.order.section) return;
    await(block.prepared(position), signals());
    fence_proxy_async_global();  // the copy engine reads them
  }

  // ---- the consumers ----

  // One tile after the other, in the end the one that is none.
  FA3_DEVICE void share(const TileCoord& tile) const {
    if (Config::kFirstColumns == Config::kLastColumns || thread() < 128)
      work<Config::kFirstColumns>(tile);
    else
      work<Config::kLastColumns>(tile);
  }

 private:
  // Of each kind for a head: one of each warp of its tiles, or of those that have a share of it.
  FA3_DEVICE int signals() const { return p.order.query_blocks * kWarps; }
  FA3_DEVICE static int thread() { return threadIdx.x - 128; }
  FA3_DEVICE int heads() const { return p.order.tiles / p.order.query_blocks; }

  // Query block `row` of all those of a KV head.
  struct Place {
    int batch, head, query_block;
    int64_t index;
  };
  FA3_DEVICE Place place(int position, int row) const {
    int batch = position / p.order.heads;
    int head = (position - batch * p.order.heads) * p.group;
    if constexpr (Config::kGrouped) head += row / p.query_blocks, row %= p.query_blocks;
    return {batch, head, row, block.block_index(row, head, batch)};
  }

  // The query blocks of a head that a tile has: from `first`.
  struct Share {
    int head, first, count;
  };
  FA3_DEVICE Share share_of(bool any, int head, int kv_block) const {
    int each = p.group * p.query_blocks / p.order.query_blocks;
    int more = p.group * p.query_blocks % p.order.query_blocks;  // tiles that have one more
    int first = kv_block * each + min(kv_block, more);
    return {head, first, any ? each + (kv_block < more) : 0};
  }

  template <int Columns>
  FA3_DEVICE void work(const TileCoord& tile) const {
    bool any = tile.query_block >= 0;
    int position = any ? block.position(tile) : -1, worked = get_shared(last());
    int next = position + p.order.section, gone = worked - p.order.section;
    Share ahead = share_of(any && next < heads(), next, tile.query_block);
    Share behind = share_of(worked >= 0 && gone >= 0, gone, get_shared(last() + 4));
#pragma unroll 1
    for (int i = 0; i < ahead.count; ++i) prepare(place(ahead.head, ahead.first + i));
#pragma unroll 1
    for (int i = 0; i < behind.count; ++i) round<Columns>(place(behind.head, behind.first + i));
    __syncwarp();
    if (thread() % 32 == 0) {
      if (ahead.count > 0 || worked >= 0) fence_gpu();
      if (any && next < heads()) count(block.prepared(next));
      if (worked >= 0) count(block.finished(worked));
      set_shared(last(), position);
      set_shared(last() + 4, tile.query_block);
    }
    __syncwarp();
  }

  FA3_DEVICE typename Variant::At at(const Place& of) const {
    return {p.aux, of.batch, of.head, p.queries, p.keys};
  }
  // The first row of which this lane has a piece, within the query block, and which piece.
  FA3_DEVICE static int row() { return thread() / 32 * kRows + thread() % 32 / Rows::kLanes; }
  FA3_DEVICE static int piece() { return thread() % Rows::kLanes; }

  template <int Columns>
  FA3_DEVICE void round(const Place& of) const {
    float x[Columns / 2];
    Gradient::template load<Columns>(p, x, of.index, thread());
    Gradient::template keep<Columns>(p, x, p.queries, of.query_block, of.head, of.batch, thread());
    __syncwarp();
    const float* used = p.dq_sums + of.index * Config::kSumFloats +
                        thread() / 128 * Config::kFirstColumns * 64 +
                        thread() / 32 % 4 * Columns * 16;
    for (int i = thread() % 32; i < Columns / 2; i += 32) discard(used + 32 * i);
  }

  // All pieces are loaded before they are used.
  FA3_DEVICE void prepare(const Place& of) const {
    const auto& from = p.before;
    uint4 o[kSteps], d[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      int q = of.query_block * kM + row() + i * kAtOnce;
      o[i] = d[i] = {0, 0, 0, 0};
      if (q < p.queries && piece() < Rows::kPieces) {
        o[i] = Rows::piece_of(from.out, from.out_at, at(of), q, piece());
        d[i] = Rows::piece_of(from.dout, from.dout_at, at(of), q, piece());
      }
    }
    constexpr int clears = Config::kSumFloats / 4;
    float4* sums = reinterpret_cast<float4*>(p.dq_sums + of.index * Config::kSumFloats);
#pragma unroll
    for (int i = 0; i < clears; i += 32 * kWarps)
      if (clears % (32 * kWarps) == 0 || i + thread() < clears)
        sums[i + thread()] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float own = 0.0f;  // of the row that this lane keeps: of which it has its piece in step piece()
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      float sum = Rows::row_sum(Rows::product(o[i], d[i]));
      if (piece() == i) own = sum;
    }
    int inside = row() + piece() * kAtOnce, q = of.query_block * kM + inside;
    if (piece() < kSteps && thread() % 32 / Rows::kLanes < kRows)
      Rows::keep(p.before, at(of), p.before.rows + of.index * kRowTerms<Variant> * kM, inside, q,
                 q < p.queries, own);
  }
};

}  // namespace fa3
