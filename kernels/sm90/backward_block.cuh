// What the two backward kernels of Hopper share: shared memory, the producer, score modifiers and
// masks on transposed blocks, and the products. A block owns a KV block and walks over the query
// blocks that see it, which the producer streams by TMA.
#pragma once
#include "fa3/backward_rows.cuh"
#include "fa3/fragment.cuh"
#include "fa3/mbarrier.cuh"
#include "fa3/operand_tile.cuh"
#include "fa3/query_blocks.cuh"
#include "fa3/tile_ring.cuh"

namespace fa3 {

template <class AuxT>
struct BackwardParams {
  TensorMap q, k, v, dout, tile, dtile;
  float* dq_sums;
  const float* rows;
  char *dk, *dv;
  RowStrides dk_at, dv_at;
  // Its query blocks are KV blocks here, its heads KV heads; where Config::kInTurn, its splits are
  // the batches that each tile is worked for.
  TileOrder order;
  BlockMap map;     // of the query blocks of each KV block
  int group, queries, keys;
  int query_blocks;
  int tile_batch, tile_head;  // 1, or 0 where the dense input broadcasts
  AuxT aux;
};

// Config says what is of which size: kBlockM, kBlockN, kDimQK, kDimV, kTileDimQK, kWarpgroups;
// kScoreStages of dS^T and how many warps share one; kWeightBytes of P^T, where one warpgroup hands
// it to the other; and the columns of dQ that each warpgroup computes.
template <class ConfigT, class VariantT>
struct BackwardBlock {
  using Config = ConfigT;
  using Variant = VariantT;
  using Dtype = typename Config::Dtype;
  using Params = BackwardParams<typename Variant::Aux>;
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
    kTileFull, kTileEmpty = kTileFull + 2,
    kBarriers = kTileEmpty + 2
  };
  static constexpr int kAtTiles = round_up(kAtBarriers + 8 * kBarriers, 16);
  static constexpr int kSharedBytes = kAtTiles + 32 + 1024;  // and room to align the base
  static constexpr int kSharedLimit = 232448;
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
      bool loaded = i < kEmpty || i == kKVFull || (i >= kTileFull && i < kTileEmpty);
      bool handed = i == kWeightsFull || i == kWeightsEmpty;
      bool shared_scores = i >= kScoresFull && i < kScoresEmpty;
      mbarrier_init(barrier(i), loaded          ? 1
                                : handed        ? 4
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

  FA3_DEVICE void produce() const {
    TileRing tiles = ring();
    PipelineState<1> kv;
    Pipe at;
    int turn = 0;
    for (TileQueue<Config::kLongestFirst> queue;; advance(queue, turn)) {
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
        int batches = p.order.tiles / (p.order.query_blocks * p.order.heads);
        int flat = tile.batch * p.order.heads + tile.head;
        tile.head = flat / batches;
        tile.batch = flat % batches;
      }
      if (kInTurn) tile.batch = turn;
      tiles.publish(tile);
      if (!more) break;
      if (turn == 0) queue.take(p.order);
      QuerySequence seq = sequence(tile);
      if (seq.count == 0) continue;
      mbarrier_wait(barrier(kKVEmpty), kv.parity() ^ 1);
      uint32_t full = barrier(kKVFull);
      mbarrier_expect(full, KTile::kBytes + VTile::kBytes);
      KTile::load(shared + kAtK, p.k, full, kEvictFirst, tile.query_block * kN, tile.head,
                  tile.batch);
      VTile::load(shared + kAtV, p.v, full, kEvictFirst, tile.query_block * kN, tile.head,
                  tile.batch);
      kv.advance();
      for (int head = tile.head * p.group; head < (tile.head + 1) * p.group; ++head) {
#pragma unroll 1
        for (int i = 0; i < seq.count; ++i) {
          load(at, seq.block(i), head, tile.batch, tile.query_block);
          at.advance();
        }
      }
    }
  }

  // The next tile, or the same of the next batch.
  FA3_DEVICE void advance(TileQueue<Config::kLongestFirst>& queue, int& turn) const {
    if constexpr (kInTurn) {
      if (++turn < p.order.splits) return;
      turn = 0;
    }
    queue.next(p.order);
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
    bool read = Variant::kScore || Variant::kMask || Variant::kColumnMask || Variant::kDerivative;
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

  // D = A B^T, both contiguous along the head dim; left running.
  template <class ATile, class BTile, int Dim>
  FA3_DEVICE static void issue_inner(float (&d)[kM / 2], uint32_t a, uint32_t b) {
    constexpr int panel_steps = ATile::kPanelColumns / 16;
    a = ATile::Desc::low(a, 16);
    b = BTile::Desc::low(b, 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < ceil_div(Dim, 16); ++i) {
      int panel = i / panel_steps, inside = i % panel_steps * 32;
      Wgmma<Dtype, kM>::ss(d, ATile::Desc::make(a + (panel * ATile::kPanelBytes + inside) / 16),
                           BTile::Desc::make(b + (panel * BTile::kPanelBytes + inside) / 16),
                           i > 0);
    }
    wgmma_commit();
  }

  // D += A B, A [64 keys, queries] in registers; left running.
  template <class BTile, int Dim>
  FA3_DEVICE static void issue_outer(float (&d)[Dim / 2], const uint32_t (&a)[kM / 4],
                                     uint32_t b) {
    b = BTile::Desc::low(b, BTile::kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
      Wgmma<Dtype, Dim>::rs(d, a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3],
                            BTile::Desc::make(b + i * 16 * BTile::kSwizzle / 16));
    wgmma_commit();
  }

  // S^T = K Q^T of the keys from `row`; left running.
  FA3_DEVICE void issue_scores(const Consumer& c, float (&s)[kM / 2], int row) const {
    issue_inner<KTile, QTile, Config::kDimQK>(s, shared + kAtK + row * KTile::kSwizzle, q_tile(c));
  }

  // dP^T = V dO^T of the keys from `row`; left running.
  FA3_DEVICE void issue_dp(const Consumer& c, float (&dp)[kM / 2], int row) const {
    issue_inner<VTile, OTile, Config::kDimV>(dp, shared + kAtV + row * VTile::kSwizzle, o_tile(c));
  }

  // Some rows and columns of dQ = dS K; left running.
  template <int Columns>
  FA3_DEVICE void issue_dq(float (&dq)[Columns / 2], uint32_t scores, int column) const {
    uint32_t a = Descriptor<128>::low(scores, 16);
    uint32_t b = KTile::Desc::low(
        shared + kAtK + column / KTile::kPanelColumns * KTile::kPanelBytes, KTile::kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kN / 16; ++i)
      Wgmma<Dtype, Columns>::st(dq,
                                Descriptor<128>::make(a + (i / 4 * kPanelBytes + i % 4 * 32) / 16),
                                KTile::Desc::make(b + i * 16 * KTile::kSwizzle / 16), i > 0);
    wgmma_commit();
  }

  // Each lane's share of a row term of the stage's queries, in the order of accumulator columns.
  using RowValues = float[kM / 4];
  FA3_DEVICE uint32_t row_address(const Consumer& c, int term) const {
    return shared + kAtRows + c.at.stage() * kRowBytes + 4 * kM * term + 16 * (c.lane % 4);
  }
  // The LSE is loaded under the scores, unless both S^T and dP^T are there at once.
  static constexpr bool kEarlyLse = !kTogether;
  FA3_DEVICE void load_lse(const Consumer& c, RowValues& x) const {
    if constexpr (kEarlyLse) load_rows(c, 0, x);
  }
  FA3_DEVICE void load_rows(const Consumer& c, int term, RowValues& x) const {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) load_shared(x + 4 * i, row_address(c, term) + 64 * i);
  }

  // uniform(seed, b, h, q, kv) of four columns from `q` of each of this thread's rows. Four lanes
  // have the keys that a Philox call gives words for: each calls for one of the columns.
  template <class Number>
  FA3_DEVICE static void draw(const Consumer& c, const TileTerms& t, int64_t seed, int q,
                              Number (&numbers)[2][4]) {
    int own = c.lane / 4 % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      RandomWords x = philox(seed, t.at.batch, t.at.head, q + own / 2 * 8 + own % 2,
                             (t.first_kv + 8 * r) / 4);
      lane_transpose(x.word, own, 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) numbers[r][i] = Number(Uniform{x.word[i]});
    }
  }

  // Whether the mask lets an element of a masked block through.
  FA3_DEVICE static bool sees_element(const TileTerms& t, const auto& row, int r, int q) {
    bool seen = t.inside[r];
    if constexpr (Variant::kRowEnd)
      seen = seen && key(t, r) < Variant::row_end(t.at, t.head, row, q);
    if constexpr (Variant::kRowBegin)
      seen = seen && key(t, r) >= Variant::row_begin(t.at, t.head, row, q);
    if constexpr (Variant::kMask)
      seen = seen && Variant::mask(t.at, t.head, row, t.col[r], q, key(t, r), 0.0f);
    return seen;
  }

  FA3_DEVICE ElementBits seen_bits(const Consumer& c, const TileTerms& t, int block) const {
    ElementBits bits = {};
#pragma unroll
    for (int i = 0; i < kM / 4; ++i) {
      int q = min(block * kM + 2 * (c.lane % 4) + 8 * (i / 2) + i % 2, p.queries - 1);
      auto row = Variant::row(t.at, t.head, q);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int at = i / 2 * 4 + 2 * r + i % 2;
        bits.word[at / 32] |= static_cast<uint32_t>(sees_element(t, row, r, q)) << at % 32;
      }
    }
    return bits;
  }

  FA3_DEVICE ElementBits kept_bits(const Consumer& c, const TileTerms& t, int block) const {
    ElementBits bits = {};
    int64_t seed = Variant::seed(t.at, t.head);
    forget(seed);  // or its 20 round keys stay in registers
#pragma unroll
    for (int j = 0; j < kM / 16; ++j) {
      int q0 = block * kM + 2 * (c.lane % 4) + 16 * j;
      Uniform numbers[2][4] = {};
      if constexpr (Variant::kUniform) draw(c, t, seed, q0, numbers);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int q = min(q0 + i / 2 * 8 + i % 2, p.queries - 1);
        auto row = Variant::row(t.at, t.head, q);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int at = 8 * j + i / 2 * 4 + 2 * r + i % 2;
          bool kept = Variant::kept(t.at, t.head, row, t.col[r], q, key(t, r), numbers[r][i]);
          bits.word[at / 32] |= static_cast<uint32_t>(kept) << at % 32;
        }
      }
    }
    return bits;
  }

  // The factor after the softmax of element i.
  FA3_DEVICE static float factor_of(const ElementBits& kept, int i) {
    return kept[i] ? Variant::kKept : Variant::kDropped;
  }

  // P^T of one query block, times its factor unless that is bits, in place of S^T. Where both are
  // computed together:
  // Fused puts dS^T in place of dP^T, otherwise P^T times the derivative goes there.
  template <bool Masked, bool Fused>
  FA3_DEVICE void weigh(const Consumer& c, const TileTerms& t, float (&s)[kM / 2],
                        float (&dp)[kM / 2], const RowValues& lse, int block,
                        const ElementBits& seen_at, const ElementBits& kept) const {
    constexpr bool tested = Masked && !kSeenBits, drawn = Variant::kWeight && !kKeptBits;
    constexpr bool clamped = tested || Variant::kScore || drawn;
    int q0 = block * kM + 2 * (c.lane % 4);
    float base[2] = {0.0f, 0.0f};
    if constexpr (Variant::kAffine) {
#pragma unroll
      for (int r = 0; r < 2; ++r) base[r] = t.slope * static_cast<float>(key(t, r) - q0);
    }
    float late_lse[4], delta[4], norm[4];
    uint32_t dense[4];
    float numbers[2][4];
#pragma unroll
    for (int j = 0; j < kM / 8; ++j) {
      if (j % 2 == 0) {
        if constexpr (!kEarlyLse) load_shared(late_lse, row_address(c, 0) + 32 * j);
        if constexpr (drawn && Variant::kUniform) draw(c, t, Variant::seed(t.at, t.head), q0 + 8 * j, numbers);
        if constexpr (kTogether && Fused) load_shared(delta, row_address(c, 1) + 32 * j);
        if constexpr (Variant::kDenseTile)
          load_transposed(dense, piece(c, kAtDense + c.at.stage() * kDenseBytes, j / 2));
        if constexpr (Variant::kWideScores) load_shared(norm, row_address(c, 2) + 32 * j);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int q = q0 + 8 * j + e;
        if constexpr (clamped) q = min(q, p.queries - 1);
        auto row = Variant::row(t.at, t.head, q);
        float offset = kEarlyLse ? lse[2 * j + e] : late_lse[j % 2 * 2 + e];
        if constexpr (Variant::kAffine)
          offset = fmaf(t.slope * t.scale, static_cast<float>(8 * j + e), offset);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int i = 4 * j + 2 * r + e;
          float x = s[i], extra = 0.0f;
          float d = 1.0f;
          if constexpr (Variant::kDenseTile) {
            float2 pair = unpack<typename Variant::TileDtype>(dense[j % 2 * 2 + r]);
            extra = e == 0 ? pair.x : pair.y;
          }
          if constexpr (Variant::kDerivative)
            d = Variant::derivative(x, t.at, t.head, row, t.col[r], q, key(t, r), extra);
          if constexpr (Variant::kScore)
            x = Variant::score(x, t.at, t.head, row, t.col[r], q, key(t, r), extra);
          if constexpr (Variant::kAffine) x += base[r];
          float exponent = fmaf(x, t.scale, -offset);
          if constexpr (Variant::kWideScores)
            exponent = fmaf(x - offset, t.scale, -norm[j % 2 * 2 + e]);
          float weight = exp2_approx(exponent);
          if constexpr (Masked) {
            bool seen;
            if constexpr (tested) seen = sees_element(t, row, r, q);
            else seen = seen_at[i];
            if (!seen) weight = 0.0f;
          }
          float factor = 1.0f;
          if constexpr (drawn)
            factor = Variant::weight(t.at, t.head, row, t.col[r], q, key(t, r),
                                     Variant::kUniform ? numbers[r][j % 2 * 2 + e] : 0.0f);
          s[i] = weight * factor;
          if constexpr (kKeptBits) factor = factor_of(kept, i);
          if constexpr (kTogether) {
            float ds = weight * d;
            if constexpr (Fused) ds *= dp[i] * factor - delta[j % 2 * 2 + e];
            if constexpr (Masked) ds = weight == 0.0f ? 0.0f : ds;
            dp[i] = ds;
          }
        }
      }
    }
  }

  FA3_DEVICE static void pack_all(uint32_t (&to)[kM / 4], const float (&x)[kM / 2]) {
#pragma unroll
    for (int i = 0; i < kM / 4; ++i) to[i] = pack<Dtype>(x[2 * i], x[2 * i + 1]);
  }
  // Times the factors after the softmax.
  FA3_DEVICE static void pack_kept(uint32_t (&to)[kM / 4], const float (&x)[kM / 2],
                                   const ElementBits& kept) {
#pragma unroll
    for (int i = 0; i < kM / 4; ++i)
      to[i] = pack<Dtype>(x[2 * i] * factor_of(kept, 2 * i),
                          x[2 * i + 1] * factor_of(kept, 2 * i + 1));
  }

  // Where this lane's row of sixteen queries by sixteen keys lies in panels at `offset`: one of four
  // 8x8 tiles, as this warp's part of a transposed accumulator is stored and loaded.
  FA3_DEVICE uint32_t piece(const Consumer& c, int offset, int sixteen) const {
    int matrix = c.lane / 8, line = c.lane % 8;
    int keys = Config::key_row(c.warpgroup) / 8 + threadIdx.x / 32 % 4 * 2 + matrix % 2;
    return shared + offset + keys / 8 * kPanelBytes +
           (16 * sixteen + matrix / 2 * 8 + line) * 128 + ((keys % 8 ^ line) << 4);
  }

  // This warpgroup's keys of dS, at `offset`, for all of them to multiply with K.
  FA3_DEVICE void share(const Consumer& c, const uint32_t (&ds)[kM / 4], int offset) const {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) store_transposed(piece(c, offset, i), ds + 4 * i);
    fence_proxy_async();
  }

  // One thread: dS as the gradient of the dense input. The stage may be written again after
  // bulk_wait_read().
  FA3_DEVICE void store_tile(int offset, int kv_block, int block, int head, int batch) const {
    if (kInTurn && batch == 0) store_panels<false>(offset, kv_block, block, head, batch);
    else store_panels<Variant::kTileSum>(offset, kv_block, block, head, batch);
    bulk_commit();
  }
  template <bool Add>
  FA3_DEVICE void store_panels(int offset, int kv_block, int block, int head, int batch) const {
#pragma unroll
    for (int i = 0; i < kN / 64; ++i)
      tma_store<Add>(p.dtile, shared + offset + i * kPanelBytes, kv_block * kN + i * 64, block * kM,
                     head * p.tile_head, batch * p.tile_batch);
  }

  // Adds pieces of this warpgroup's part of dQ, of `Columns` columns, to the sums of a query block.
  template <int Columns, int First = 0, int Last = Columns / 8>
  FA3_DEVICE void add_dq(const Consumer& c, const float (&dq)[Columns / 2], int block) const {
    constexpr int count = Columns / 2;
    float* to = p.dq_sums + static_cast<int64_t>(block) * Config::kSumFloats +
                c.warpgroup * Config::kFirstColumns * 64 + threadIdx.x / 32 % 4 * count * 32 +
                c.lane * 4;
#pragma unroll
    for (int j = First; j < Last; ++j)
      add_global(to + j * 128, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
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

  // One gradient of this thread's two keys.
  template <int Dim>
  FA3_DEVICE void store(const Consumer& c, const TileCoord& tile, const float (&x)[Dim / 2],
                        float factor, char* to, const RowStrides& at) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int kv = first_key(c, tile) + 8 * r;
      store_row<Dtype, Dim>(x, r, factor, kv < p.keys, to + 2 * at.at(tile.batch, tile.head, kv));
    }
  }

  // dK and dV of keys that no query sees.
  FA3_DEVICE void store_zeros(const TileCoord& tile) const {
    constexpr uint32_t nothing[4] = {};
    constexpr int threads = 128 * Config::kWarpgroups / kN;  // for each key
    int thread = threadIdx.x - 128;
    int kv = tile.query_block * kN + thread / threads;
    char* dk = p.dk + 2 * p.dk_at.at(tile.batch, tile.head, kv);
    char* dv = p.dv + 2 * p.dv_at.at(tile.batch, tile.head, kv);
    for (int i = thread % threads; i < Config::kDimQK / 8; i += threads)
      store_if(kv < p.keys, dk + 16 * i, nothing);
    for (int i = thread % threads; i < Config::kDimV / 8; i += threads)
      store_if(kv < p.keys, dv + 16 * i, nothing);
  }
};

}  // namespace fa3
