// What the producer and the consumers of a thread block share: configuration, parameters, shared
// memory, and what the rows of a tile are.
#pragma once
#include "fa3/block_map.cuh"
#include "fa3/dense_tile.cuh"
#include "fa3/distance_table.cuh"
#include "fa3/operand_tile.cuh"
#include "fa3/tile_ring.cuh"

namespace fa3 {

// Packed: a tile holds some queries of each of several heads that share a KV head (FlashAttention's
// PackGQA), so that a few queries fill it. SplitKV: the key blocks of a tile may be dealt to several
// thread blocks, whose parts fa3/combine.cuh puts together. HeldQueries: products read queries from
// registers, not from shared memory each time. Optimistic: weights are computed against the row
// maximum of the blocks before, and again only where that turns out to have been too low.
// DenseFirst: the dense input, which comes and goes with the keys, or a table by kv - q is what scores
// begin with, to which products add; their factor is multiplied into the held queries. Ahead: columns
// of a block whose weights are computed while the values of the block before are still multiplied.
template <class DtypeT, int DimQK, int DimV, int BlockM_, int BlockN_, int Stages_,
          bool LongestFirst_, bool PingPong_, bool Packed_, bool SplitKV_,
          bool HeldQueries_, bool Optimistic_, bool DenseFirst_, int Ahead_>
struct ForwardConfig {
  using Dtype = DtypeT;
  static constexpr int kDimQK = DimQK, kDimV = DimV, kBlockM = BlockM_, kBlockN = BlockN_;
  static constexpr int kStages = Stages_;
  static constexpr bool kLongestFirst = LongestFirst_, kPingPong = PingPong_;
  static constexpr bool kPacked = Packed_, kSplitKV = SplitKV_;
  static constexpr bool kHeldQueries = HeldQueries_, kOptimistic = Optimistic_;
  static constexpr bool kDenseFirst = DenseFirst_;
  static constexpr int kAhead = Ahead_;
  static constexpr int kWarpgroups = BlockM_ / 64;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // Of 65,536 registers consumers take what their tiles need and the producer the rest. Three
  // warpgroups hold scores, weights and output in 152 where those are small enough.
  static constexpr bool kTight = 3 * BlockN_ / 4 + DimV / 2 > 108;
  static constexpr int kProducerRegisters =
      kWarpgroups == 2 ? 40 : kWarpgroups == 3 && kTight ? 32 : 56;
  static constexpr int kConsumerRegisters =
      kWarpgroups == 2 ? 232 : kWarpgroups == 1 ? 248 : kTight ? 160 : 152;
  static_assert(DimQK % 8 == 0 && DimV % 8 == 0 && DimQK <= 256 && DimV <= 256, "head dims");
  static_assert(BlockM_ % 64 == 0 && kWarpgroups <= 3 && BlockN_ % 16 == 0, "tile");
  static_assert(Ahead_ % 8 == 0 && Ahead_ <= BlockN_, "columns of a block");
  static_assert(!Packed_ || BlockM_ == 64, "packed heads fill one warpgroup");
};

// A packed tile: row heads * rows are `rows` queries of each of `heads` heads, head by head. A KV
// head's group is `chunks` such runs of heads, the last of which may be shorter.
struct Packing {
  int heads, rows, chunks;
};

template <class Aux, int TileMaps>
struct ForwardParams {
  TensorMap q, k, v;
  TensorMap tile[TileMaps];  // of the dense input: panels of 128 bytes, and of 16 keys
  void* out;
  float* lse;  // (batch, heads, queries), natural log
  int64_t out_batch, out_head, out_row;  // strides in elements
  TileOrder order;
  BlockMap map;
  float* partial_out;     // (splits, rows, DimV), where order.splits > 1
  float2* partial_state;  // (splits, rows): row maximum and row sum
  int64_t rows;           // batch * heads * queries
  const float* table;     // of DistanceTable
  int heads, group;       // query heads, and those of a KV head
  int queries, keys;
  Packing packing;
  int tile_batch, tile_head;  // 1, or 0 where the dense input broadcasts
  int turn;  // batches that go side by side, because they share the dense input, or 0
  Aux aux;
};

// What is known of the two rows of a consumer's thread, eight apart. Heads differ between them only
// in a packed tile.
template <class Variant, bool Packed>
struct RowTerms {
  static constexpr int kHeads = Packed ? 2 : 1;
  typename Variant::At at[kHeads];
  typename Variant::Head head[kHeads];
  typename Variant::Row row[2];
  int q[2];  // past the last query: the last
  bool inside[2];
  float distance[2];  // this thread's first column less the row, for affine terms
  float scale[2], slope[2];

  FA3_DEVICE static constexpr int head_of(int r) { return Packed ? r : 0; }
};

template <class Config, class Variant>
struct ForwardBlock {
  using Dtype = typename Config::Dtype;
  using At = typename Variant::At;
  using Terms = RowTerms<Variant, Config::kPacked>;
  static constexpr int kM = Config::kBlockM, kN = Config::kBlockN, kStages = Config::kStages;
  using QTile = OperandTile<Config::kDimQK, kM>;
  using KTile = OperandTile<Config::kDimQK, kN>;
  using VTile = OperandTile<Config::kDimV, kN>;
  using Pipe = PipelineState<kStages>;

  using Dense = DenseTile<typename Variant::TileDtype, kM, kN>;
  static constexpr int kDenseBytes = Variant::kDenseTile ? Dense::kBytes : 0;
  static_assert(!Variant::kDenseTile || !Config::kPacked, "a dense tile is of one head");
  using Params = ForwardParams<typename Variant::Aux, Variant::kDenseTile ? Dense::kMaps : 1>;
  static_assert(!Config::kDenseFirst ||
                    (Variant::kDenseTile != Variant::kByDistance && Config::kHeldQueries),
                "what scores begin with");
  static_assert(Config::kDenseFirst || !Variant::kByDistance, "a table is what scores begin with");

  // A second query stage, where it fits, lets the next tile's queries load ahead.
  static constexpr int kSharedLimit = 232448;
  static constexpr int kOperandBytes = kStages * (KTile::kBytes + VTile::kBytes + kDenseBytes);
  static constexpr int kQStages =
      2 * QTile::kBytes + kOperandBytes + 2048 <= kSharedLimit ? 2 : 1;

  // Shared memory, in bytes from a base aligned to 1024.
  static constexpr int kAtQ = 0;
  static constexpr int kAtK = kAtQ + kQStages * QTile::kBytes;
  static constexpr int kAtV = kAtK + kStages * KTile::kBytes;
  static constexpr int kAtDense = kAtV + kStages * VTile::kBytes;
  static constexpr int kAtBarriers = kAtDense + kStages * kDenseBytes;
  enum Barrier {
    kQFull, kQEmpty = kQFull + kQStages,
    kKFull = kQEmpty + kQStages, kKEmpty = kKFull + kStages,
    kVFull = kKEmpty + kStages, kVEmpty = kVFull + kStages,
    kDenseFull = kVEmpty + kStages, kDenseEmpty = kDenseFull + kStages,
    kTileFull = kDenseEmpty + kStages, kTileEmpty = kTileFull + 2,
    kBarriers = kTileEmpty + 2
  };
  static constexpr int kAtTiles = round_up(kAtBarriers + 8 * kBarriers, 16);
  static constexpr int kSharedBytes = kAtTiles + 32 + 1024;  // and room to align the base
  static_assert(kSharedBytes <= kSharedLimit, "the tile needs more shared memory than there is");

  const Params& p;
  uint32_t shared;

  FA3_DEVICE uint32_t barrier(int which) const { return shared + kAtBarriers + 8 * which; }

  FA3_DEVICE TileRing ring() const {
    return {shared + kAtTiles, barrier(kTileFull), barrier(kTileEmpty)};
  }

  FA3_DEVICE void init_barriers() const {
    constexpr int consumer_warps = 4 * Config::kWarpgroups;
    for (int i = 0; i < kBarriers; ++i) {
      bool empty = (i >= kQEmpty && i < kKFull) || (i >= kKEmpty && i < kVFull) ||
                   (i >= kVEmpty && i < kDenseFull) || (i >= kDenseEmpty && i < kTileFull) ||
                   i >= kTileEmpty;
      mbarrier_init(barrier(i), empty ? consumer_warps : 1);
    }
    mbarrier_init_fence();
  }

  // Rows of a packed tile that no load writes are zero: the warp's vote on rescaling would see them.
  FA3_DEVICE void clear_queries() const {
    for (int at = 16 * threadIdx.x; at < kQStages * QTile::kBytes; at += 16 * Config::kThreads)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(shared + kAtQ + at), "r"(0)
                   : "memory");
    fence_proxy_async();
  }

  FA3_DEVICE At site(int batch, int head) const { return {p.aux, batch, head, p.queries, p.keys}; }

  // Queries of a head in a tile.
  FA3_DEVICE int tile_rows() const { return Config::kPacked ? p.packing.rows : kM; }

  // The key blocks of a tile; masks are the same for all heads of a packed one.
  FA3_DEVICE BlockSequence sequence(const TileCoord& tile) const {
    int rows = tile_rows(), first = tile.query_block * rows;
    BlockSequence all =
        block_sequence<Variant, kN>(site(tile.batch, tile.head), p.map, tile.query_block, first,
                                    min(first + rows, p.queries));
    if constexpr (Config::kSplitKV) return all.part(tile.split, p.order.splits);
    else return all;
  }

  // Of the thread whose first row of the tile is `row`.
  FA3_DEVICE Terms terms(const TileCoord& tile, int row, int lane) const {
    if constexpr (Config::kPacked) {
      int rows = p.packing.rows, first = row / rows, second = (row + 8) / rows;
      int heads = min(p.packing.heads, p.group - tile.head % p.group);
      int last = heads - 1;
      Terms t{{site(tile.batch, tile.head + min(first, last)),
               site(tile.batch, tile.head + min(second, last))}};
      int q = tile.query_block * rows;
      fill(t, 0, q + row - first * rows, first < heads, lane);
      fill(t, 1, q + row + 8 - second * rows, second < heads, lane);
      return t;
    } else {
      Terms t{{site(tile.batch, tile.head)}};
      fill(t, 0, tile.query_block * kM + row, true, lane);
      fill(t, 1, tile.query_block * kM + row + 8, true, lane);
      return t;
    }
  }

 private:
  FA3_DEVICE void fill(Terms& t, int r, int q, bool inside, int lane) const {
    int h = Terms::head_of(r);
    if (r == h) t.head[h] = Variant::head(t.at[h]);
    t.scale[r] = Variant::scale(t.head[h]);
    t.slope[r] = Variant::slope(t.head[h]);
    t.inside[r] = inside && q < p.queries;
    t.q[r] = min(q, p.queries - 1);
    t.distance[r] = static_cast<float>(2 * (lane % 4) - t.q[r]);
    t.row[r] = Variant::row(t.at[h], t.head[h], t.q[r]);
  }
};

}  // namespace fa3
