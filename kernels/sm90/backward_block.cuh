// What the two backward kernels of Hopper share: parameters, shared memory, the producer, and where
// a thread's elements are. A block owns a KV block and walks over the query blocks that see it, which
// the producer streams by TMA.
#pragma once
#include "fa3/backward_rows.cuh"
#include "fa3/fragment.cuh"
#include "fa3/mbarrier.cuh"
#include "fa3/operand_tile.cuh"
#include "fa3/query_blocks.cuh"
#include "fa3/tile_ring.cuh"
#include "sm90/backward_beside.cuh"
#include "sm90/query_gradient.cuh"

namespace fa3 {

template <class AuxT>
struct BackwardParams {
  TensorMap q, k, v, dout, tile, dtile;
  float* dq_sums;
  const float* rows;
  char *dk, *dv;
  RowStrides dk_at, dv_at;
  char* dq;  // this, and what follows to `slots`, only where Config::kFinishes or kBeside
  int* progress;
  RowStrides dq_at;
  int slots;  // KV heads that dq_sums has room for: others follow in their place
  int batches;
  // Its query blocks are KV blocks here, its heads KV heads; where Config::kInTurn, its splits are
  // the batches that each tile is worked for.
  TileOrder order;
  BlockMap map;     // of the query blocks of each KV block
  int group, queries, keys;
  int query_blocks;
  int tile_batch, tile_head;  // 1, or 0 where the dense input broadcasts
  AuxT aux;
};

// What is computed for other heads beside the products needs O and dO.
template <class AuxT, bool Beside>
struct BackwardParamsOf : BackwardParams<AuxT> {};
template <class AuxT>
struct BackwardParamsOf<AuxT, true> : BackwardParams<AuxT> {
  RowTermsParams<AuxT> before;
};

// Config says what is of which size: kBlockM, kBlockN, kDimQK, kDimV, kTileDimQK, kWarpgroups;
// kScoreStages of dS^T and how many warps share one; kWeightBytes of P^T, where one warpgroup hands
// it to the other; and the columns of dQ that each warpgroup computes.
template <class ConfigT, class VariantT>
struct BackwardBlock {
  using Shared = BackwardBlock;
  using Config = ConfigT;
  using Variant = VariantT;
  using Dtype = typename Config::Dtype;
  using Params = BackwardParamsOf<typename Variant::Aux, Config::kBeside>;
  using At = typename Variant::At;
  static constexpr int kM = Config::kBlockM, kN = Config::kBlockN;
  using QTile = OperandTile<Config::kTileDimQK, kM>;
  using OTile = OperandTile<Config::kDimV, kM>;
  using KTile = OperandTile<Config::kTileDimQK, kN>;
  using VTile = OperandTile<Config::kDimV, kN>;

  // dS in shared memory, and the dense (q, kv) input of a 16-bit type: panels of 64 keys, rows of a
  // query each.
  static constexpr int kPanelBytes = kM * 128;
  static constexpr int kScoreBytes = kN / 64 * kPanelBytes;
  static constexpr int kDenseBytes = Variant::kDenseTile ? kScoreBytes : 0;
  static constexpr int kRowBytes = 4 * kRowTerms<Variant> * kM;

  // What is asked of each element, its mask or whether dropout keeps it, as bits that are found
  // under the products before: an element's test then needs no registers of its own.
  static constexpr bool kSeenBits = Config::kBits && Variant::kMask;
  static constexpr bool kKeptBits = Config::kBits && Variant::kTwoWeights;
  // A bit for each of a thread's elements of a query block, in the order of accumulators.
  struct ElementBits {
    uint32_t word[kM / 64];

    FA3_DEVICE bool operator[](int i) const { return word[i / 32] >> i % 32 & 1; }
  };

  // Whether dS is computed with P, not after it: from what both need of an element.
  static constexpr bool kTogether = Variant::kDerivative || (Variant::kWeight && !kKeptBits);

  // A stage holds a query block's Q, dO and row terms.
  static constexpr int kStages = 2;
  using Pipe = PipelineState<kStages>;
  static constexpr int kStageBytes = QTile::kBytes + OTile::kBytes + kDenseBytes + kRowBytes;

  static constexpr int kAtK = 0;
  static constexpr int kAtV = kAtK + KTile::kBytes;
  static constexpr int kAtQ = kAtV + VTile::kBytes;
  static constexpr int kAtO = kAtQ + kStages * QTile::kBytes;
  static constexpr int kAtDense = kAtO + kStages * OTile::kBytes;
  static constexpr int kAtScores = kAtDense + kStages * kDenseBytes;
  static constexpr int kAtWeights = kAtScores + Config::kScoreStages * kScoreBytes;
  static constexpr int kAtRows = kAtWeights + Config::kWeightBytes;
  static constexpr int kAtBarriers = kAtRows + kStages * kRowBytes;
  enum Barrier {
    kFull, kEmpty = kFull + kStages,
    kKVFull = kEmpty + kStages, kKVEmpty,
    kScoresFull, kScoresEmpty = kScoresFull + Config::kScoreStages,
    kWeightsFull = kScoresEmpty + Config::kScoreStages, kWeightsEmpty,
    kTileFull, kTileEmpty = kTileFull + 2, kTileDone = kTileEmpty + 2,
    kPieceFull = kTileDone + (Config::kFinishes ? 2 : 0),
    kBarriers = kPieceFull + (Config::kFinishes ? 2 : 0)
  };
  static constexpr int kAtTiles = round_up(kAtBarriers + 8 * kBarriers, 16);
  static constexpr int kSharedLimit = 232448;
  static constexpr int kAtLast = kAtTiles + 32;  // see HeadsBeside
  // For pieces of dQ, of each of the warps that round them.
  using Pieces = QueryGradientShape<Config>;
  static constexpr int kAtPieces = round_up(kAtTiles + 32, 128);
  static constexpr int kRoom = (kSharedLimit - 1024 - kAtPieces) / Pieces::kBytes;
  static constexpr int kRounders = Config::kFinishes ? (kRoom > 1 ? 2 : 1) : 0;
  static_assert(!Config::kFinishes || (kRoom > 0 && !Variant::kDenseTile),
                "dQ is rounded by a kernel of its own");
  static constexpr int kSharedBytes =  // and room to align the base
      (Config::kFinishes ? kAtPieces + kRounders * Pieces::kBytes : kAtLast + 64) + 1024;
  static_assert(kSharedBytes <= kSharedLimit, "the tile needs more shared memory than there is");

  const Params& p;
  uint32_t shared;

  FA3_DEVICE uint32_t barrier(int which) const { return shared + kAtBarriers + 8 * which; }

  // The head is the first of the group.
  FA3_DEVICE At site(const TileCoord& tile) const {
    return {p.aux, tile.batch, tile.head * p.group, p.queries, p.keys};
  }

  // Of a query block among those of all heads; fewer than 2^31, as each has KBs of its own.
  FA3_DEVICE int block_index(int block, int head, int batch) const {
    return (batch * (p.order.heads * p.group) + head) * p.query_blocks + block;
  }

  // KV heads of all batches in the order of tiles.
  FA3_DEVICE int position(const TileCoord& tile) const {
    return tile.batch * p.order.heads + tile.head;
  }

  // The sums of dQ of a KV head's first query block.
  FA3_DEVICE int first_sums(int position) const {
    return static_cast<uint32_t>(position) % static_cast<uint32_t>(p.slots) *
           (p.group * p.query_blocks);
  }
  FA3_DEVICE int first_sums(const TileCoord& tile) const {
    if constexpr (Config::kFinishes) return first_sums(position(tile));
    else return block_index(0, tile.head * p.group, tile.batch);
  }

  // Where Config::kFinishes or kBeside: pieces that are taken, and of each head how many tiles have
  // been worked and how many pieces rounded, or prepared. The tiles that are taken come first.
  FA3_DEVICE int* pieces_taken() const { return p.progress + kCounterInts; }
  FA3_DEVICE int* finished(int position) const {
    return p.progress + (2 + 2 * position) * kCounterInts;
  }
  FA3_DEVICE int* rounded(int position) const { return finished(position) + kCounterInts; }
  FA3_DEVICE int* prepared(int position) const { return finished(position) + kCounterInts; }

  FA3_DEVICE QuerySequence sequence(const TileCoord& tile) const {
    return query_sequence<Variant, kM, kN>(site(tile), p.map, tile.query_block);
  }

  // Query blocks of all heads of the group.
  FA3_DEVICE int steps(const QuerySequence& seq) const {
    return Config::kGrouped ? seq.count * p.group : seq.count;
  }

  FA3_DEVICE TileRing ring() const {
    return {shared + kAtTiles, barrier(kTileFull), barrier(kTileEmpty)};
  }

  FA3_DEVICE void init_barriers() const {
    constexpr int consumer_warps = 4 * Config::kWarpgroups;
    for (int i = 0; i < kBarriers; ++i) {
      bool loaded = i < kEmpty || i == kKVFull || (i >= kTileFull && i < kTileEmpty) ||
                    (i >= kPieceFull && i < kBarriers);
      bool handed = i == kWeightsFull || i == kWeightsEmpty;
      bool watched = Config::kFinishes && i >= kTileEmpty && i < kTileDone;
      bool shared_scores = i >= kScoresFull && i < kScoresEmpty;
      mbarrier_init(barrier(i), loaded          ? 1
                                : handed        ? 4
                                : watched       ? consumer_warps + 1
                                : shared_scores ? Config::kScoreWarps
                                                : consumer_warps);
    }
    mbarrier_init_fence();
  }

  // Whether the batches of a tile are worked one after the other by the same block: the first
  // stores the dense input's gradient, to which the others add.
  static constexpr bool kInTurn = Config::kInTurn;
  static_assert(!kInTurn || Variant::kTileSum, "turns are for a gradient that is a sum");

  // ---- producer: one thread ----

  FA3_DEVICE void load(Pipe at, int block, int head, int batch, int kv_block) const {
    mbarrier_wait(barrier(kEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = barrier(kFull + at.stage());
    mbarrier_expect(full, kStageBytes);
    QTile::load(shared + kAtQ + at.stage() * QTile::kBytes, p.q, full, kEvictLast, block * kM,
                head, batch);
    OTile::load(shared + kAtO + at.stage() * OTile::kBytes, p.dout, full, kEvictLast, block * kM,
                head, batch);
    if constexpr (Variant::kDenseTile) {
#pragma unroll
      for (int i = 0; i < kN / 64; ++i)
        tma_load(shared + kAtDense + at.stage() * kDenseBytes + i * kPanelBytes, p.tile, full,
                 kEvictFirst, kv_block * kN + i * 64, block * kM, head * p.tile_head,
                 batch * p.tile_batch);
    }
    bulk_load(shared + kAtRows + at.stage() * kRowBytes,
              p.rows + static_cast<int64_t>(block_index(block, head, batch)) * (kRowBytes / 4),
              kRowBytes, full);
  }

  // The tiles of this block, and where there is a counter its first one; thread 0.
  FA3_DEVICE auto tiles_of_block() const {
    if constexpr (Config::kFinishes || Config::kBeside)
      return TakenTiles{atomicAdd(p.order.next, 1)};
    else return TileQueue<Config::kLongestFirst>{};
  }

  FA3_DEVICE HeadsBeside<BackwardBlock> beside() const { return {*this, p}; }

  FA3_DEVICE void produce(auto queue) const {
    TileRing tiles = ring();
    PipelineState<1> kv;
    Pipe at;
    int turn = 0;
    [[maybe_unused]] int last = -1;  // the tile before, as position() has it
    for (;; advance(queue, turn)) {
      TileCoord tile{-1, 0, 0};
      bool more = queue.index < p.order.tiles;
      if (more) {
        tile = p.order.template coord<Config::kLongestFirst>(queue.index);
        // Of a causal head the first KV block meets the most queries.
        if (Config::kLongestFirst)
          tile.query_block = p.order.query_blocks - 1 - tile.query_block;
      }
      // Batches that share a dense input take turns, so that it is read once.
      if (Variant::kDenseTile && !kInTurn && more && p.tile_batch == 0) {
        int flat = tile.batch * p.order.heads + tile.head;
        tile.head = flat / p.batches;
        tile.batch = flat % p.batches;
      }
      if (kInTurn) tile.batch = turn;
      if constexpr (Config::kBeside) last = beside().await_worked(last, more ? position(tile) : -1);
      tiles.publish(tile);
      if (!more) break;
      if (!Config::kBeside && turn == 0) queue.take(p.order);
      QuerySequence seq = sequence(tile);
      if (!Config::kFinishes && seq.count == 0) continue;
      if constexpr (Config::kFinishes) {
        int before = position(tile) - p.slots;  // whose sums lie where those of this head will
        if (before >= 0) await(rounded(before), Pieces::kPieces * p.group * p.query_blocks);
      }
      if constexpr (Config::kBeside) beside().await_rows(position(tile));
      int i = 0;
      // The first queries' stage is free before K and V of the last tile are: they are there when
      // these come. With listed query blocks there are no registers for that.
      if (!Variant::kBlockMap && seq.count > 0) {
        load(at, seq.block(0), tile.head * p.group, tile.batch, tile.query_block);
        at.advance();
        i = 1;
      }
      mbarrier_wait(barrier(kKVEmpty), kv.parity() ^ 1);
      uint32_t full = barrier(kKVFull);
      kv.advance();
      if (seq.count == 0) {
        mbarrier_arrive(full);
        continue;
      }
      mbarrier_expect(full, KTile::kBytes + VTile::kBytes);
      KTile::load(shared + kAtK, p.k, full, kEvictFirst, tile.query_block * kN, tile.head,
                  tile.batch);
      VTile::load(shared + kAtV, p.v, full, kEvictFirst, tile.query_block * kN, tile.head,
                  tile.batch);
      for (int head = tile.head * p.group; head < (tile.head + 1) * p.group; ++head) {
#pragma unroll 1
        for (; i < seq.count; ++i) {
          load(at, seq.block(i), head, tile.batch, tile.query_block);
          at.advance();
        }
        i = 0;
      }
    }
  }

  // The next tile, or the same of the next batch.
  FA3_DEVICE void advance(auto& queue, int& turn) const {
    if constexpr (kInTurn) {
      if (++turn < p.order.splits) return;
      turn = 0;
    }
    if constexpr (Config::kBeside) queue.take(p.order);  // no sooner: its share is waited for
    queue.next(p.order);
  }

  // ---- a warp that tells when a tile is worked: its additions to dQ were made before ----

  FA3_DEVICE void watch() const {
    TileRing tiles = ring();
    for (;;) {
      TileCoord tile = tiles.look();
      if (tile.query_block < 0) break;
      mbarrier_wait(barrier(kTileDone + tiles.state.stage()), tiles.state.parity());
      tiles.pass();
      if (threadIdx.x % 32 == 0) signal(finished(position(tile)));
    }
  }

  // ---- consumers ----

  struct Consumer {
    int warpgroup, lane;
    Pipe at;  // dS^T is passed as often, and so are weights
    PipelineState<1> kv;
  };

  struct TileTerms {
    At at;
    typename Variant::Head head;
    typename Variant::Col col[2];
    int first_kv;  // of this thread's two, eight apart
    bool exists[2], inside[2];  // whether it is a key, and one that the column mask allows
    float scale, slope;
  };

  // One of this thread's two keys; past the last key that one, where the variant reads it.
  FA3_DEVICE static int key(const TileTerms& t, int r) {
    int kv = t.first_kv + 8 * r;
    bool read = Variant::kScore || Variant::kMask || Variant::kColumnMask ||
                Variant::kDerivative || Variant::kWeight;
    return read ? min(kv, t.at.keys - 1) : kv;
  }

  FA3_DEVICE static Consumer consumer() {
    return {__shfl_sync(~0u, static_cast<int>(threadIdx.x / 128) - 1, 0),
            static_cast<int>(threadIdx.x % 32)};
  }

  FA3_DEVICE void release(int which, int lane) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier(which));
  }

  FA3_DEVICE void wait_full(const Consumer& c) const {
    mbarrier_wait(barrier(kFull + c.at.stage()), c.at.parity());
  }

  FA3_DEVICE uint32_t q_tile(const Consumer& c) const {
    return shared + kAtQ + c.at.stage() * QTile::kBytes;
  }

  FA3_DEVICE uint32_t o_tile(const Consumer& c) const {
    return shared + kAtO + c.at.stage() * OTile::kBytes;
  }

  // Where this lane's row of sixteen queries by sixteen keys lies in panels at `offset`: one of four
  // 8x8 tiles, as this warp's part of a transposed accumulator is stored and loaded.
  FA3_DEVICE uint32_t piece(const Consumer& c, int offset, int sixteen) const {
    int matrix = c.lane / 8, line = c.lane % 8;
    int keys = Config::key_row(c.warpgroup) / 8 + threadIdx.x / 32 % 4 * 2 + matrix % 2;
    return shared + offset + keys / 8 * kPanelBytes +
           (16 * sixteen + matrix / 2 * 8 + line) * 128 + ((keys % 8 ^ line) << 4);
  }

  FA3_DEVICE TileTerms terms(const Consumer& c, const TileCoord& tile) const {
    TileTerms t{site(tile)};
    t.first_kv = first_key(c, tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) t.exists[r] = t.inside[r] = t.first_kv + 8 * r < p.keys;
    refresh(t);
    return t;
  }

  // What depends on the query head.
  FA3_DEVICE static void refresh(TileTerms& t) {
    t.head = Variant::head(t.at);
    t.scale = Variant::scale(t.head);
    t.slope = Variant::slope(t.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      t.col[r] = Variant::col(t.at, t.head, key(t, r));
      if constexpr (Variant::kColumnMask)
        t.inside[r] = t.exists[r] && Variant::column_mask(t.at, t.head, t.col[r], key(t, r));
    }
  }

  // The first of this thread's two keys, eight apart.
  FA3_DEVICE static int first_key(const Consumer& c, const TileCoord& tile) {
    return tile.query_block * kN + Config::key_row(c.warpgroup) + threadIdx.x / 32 % 4 * 16 +
           c.lane / 4;
  }
};

}  // namespace fa3
