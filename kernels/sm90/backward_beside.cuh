// What the consumers of a backward do for other heads when a tile begins, while its keys and values
// are on their way. Heads are worked in sections (TileOrder), and each tile has a share of a head of
// the next section, whose row terms it computes and whose sums it clears, and of a head of the section
// before the last, whose dQ it rounds. So O, dO and the sums pass through memory beside products. The
// first section's rows and the last two's dQ are left to kernels before and after
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
  static constexpr int kAtOnce = Block::kN / kM;  // query blocks of a tile's share, about
  static_assert(!Config::kBeside || (Config::kLongestFirst && !Config::kFinishes), "sections");
  static_assert(!Config::kBeside || (!Variant::kWideScores && !Variant::kFindDead), "row terms");

  const Block& block;
  const Params& p;

  // Of each kind for a head: one of each warp that has a share.
  FA3_DEVICE static int signals(const Params& p) { return p.order.query_blocks * kWarps; }

  // Of the tile that was worked last, in shared memory: registers are scarce in between.
  FA3_DEVICE uint32_t before() const {
    return block.shared + Block::kAtBefore + 4 * (thread() / 32);
  }
  FA3_DEVICE void start() const { set_shared(before(), -1); }

  // One tile after the other, in the end the one that is none.
  FA3_DEVICE void share(const TileCoord& tile) const {
    bool any = tile.query_block >= 0;
    int position = any ? block.position(tile) : -1;
    int next = position + p.order.section, gone = position - 2 * p.order.section;
    bool ahead = any && next < heads();
    int each = p.group * p.query_blocks / p.order.query_blocks;
    int more = p.group * p.query_blocks % p.order.query_blocks;  // tiles that have one more
    int first = tile.query_block * each + min(tile.query_block, more);
    int last = first + each + (tile.query_block < more);
    if (ahead) {
#pragma unroll 1
      for (int row = first; row < last; row += kAtOnce) prepare(next, row, last);
    }
    __syncwarp();
    if (thread() % 32 == 0) {
      int worked = get_shared(before());
      if (ahead || worked >= 0) fence_gpu();
      if (ahead) count(block.prepared(next));
      if (worked >= 0) count(block.finished(worked));
      set_shared(before(), position);
      if (gone >= 0) await(block.finished(gone), signals(p));
    }
    __syncwarp();
    if (gone >= 0) {
#pragma unroll 1
      for (int row = first; row < last; row += kAtOnce) {
        if (thread() / 128 + 1 < Config::kWarpgroups) round<Config::kFirstColumns>(gone, row, last);
        else round<Config::kLastColumns>(gone, row, last);
      }
    }
  }

 private:
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

  // Each warp has some rows of a query block, and each lane a piece of several: all are loaded before
  // they are used.
  FA3_DEVICE void prepare(int position, int row, int last) const {
    constexpr int rows = kM / kWarps, at_once = 32 / Rows::kLanes;
    constexpr int count = rows < at_once ? 1 : rows / at_once;
    const auto& from = p.before;
    int piece = thread() % Rows::kLanes, other = thread() % 32 / Rows::kLanes;
    int inside = thread() / 32 * rows + other;
    uint4 o[kAtOnce][count], d[kAtOnce][count];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      Place to = place(position, min(row + n, last - 1));
      typename Variant::At at{p.aux, to.batch, to.head, p.queries, p.keys};
      int q = to.query_block * kM + inside;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        o[n][i] = d[n][i] = {0, 0, 0, 0};
        if (q + i * at_once < p.queries && piece < Rows::kPieces) {
          o[n][i] = Rows::piece_of(from.out, from.out_at, at, q + i * at_once, piece);
          d[n][i] = Rows::piece_of(from.dout, from.dout_at, at, q + i * at_once, piece);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (row + n >= last) break;
      Place to = place(position, row + n);
      typename Variant::At at{p.aux, to.batch, to.head, p.queries, p.keys};
      float4* sums = reinterpret_cast<float4*>(from.dq_sums + to.index * Config::kSumFloats);
#pragma unroll
      for (int i = 0; i < Config::kSumFloats / 4; i += 32 * kWarps)
        if (Config::kSumFloats / 4 % (32 * kWarps) == 0 || i + thread() < Config::kSumFloats / 4)
          sums[i + thread()] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      float own = 0.0f;  // of the row that this lane keeps: of which it has piece i in step i
#pragma unroll
      for (int i = 0; i < count; ++i) {
        float sum = Rows::row_sum(Rows::product(o[n][i], d[n][i]));
        if (piece == i) own = sum;
      }
      int q = to.query_block * kM + inside + piece * at_once;
      if (piece < count && other < rows)
        Rows::keep(from, at, from.rows + to.index * kRowTerms<Variant> * kM,
                   inside + piece * at_once, q, q < p.queries, own);
    }
  }

  template <int Columns>
  FA3_DEVICE void round(int position, int row, int last) const {
    float x[kAtOnce][Columns / 2];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      Gradient::template load<Columns>(p, x[n], place(position, min(row + n, last - 1)).index,
                                       thread());
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      Place to = place(position, min(row + n, last - 1));
      Gradient::template keep<Columns>(p, x[n], row + n < last ? p.queries : 0, to.query_block,
                                       to.head, to.batch, thread());
    }
  }
};

}  // namespace fa3
