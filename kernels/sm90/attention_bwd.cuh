// Attention backward on Hopper, for head dims up to 128. A block owns a KV block, 64 keys for each
// consumer warpgroup, and walks over the query blocks that see it; the producer streams Q, dO and
// the row terms by TMA. For each query block, transposed so that weights stay in registers:
//   S^T = K Q^T, dP^T = V dO^T, P^T = exp2(S^T - LSE), dS^T = P^T (dP^T - delta) dscore/ds
//   dV += P^T dO, dK += dS^T Q       from registers
//   dQ = dS K                        dS^T through shared memory, all keys of the block
// dQ is added to fp32 sums in global memory straight from registers, 512 contiguous bytes a warp,
// in the order of the accumulators: through shared memory (FlashAttention-3) it would take a fifth
// of that memory's bandwidth, which bounds this kernel as much as the tensor cores do.
#pragma once
#include "fa3/backward_rows.cuh"
#include "fa3/fragment.cuh"
#include "fa3/mbarrier.cuh"
#include "fa3/operand_tile.cuh"
#include "fa3/query_blocks.cuh"
#include "fa3/tile_ring.cuh"

namespace fa3 {

// BlockM is 64, and the warpgroups share out the columns of dQ; or 64 for each of them, and they
// share out its rows. EarlyValues issues dV while dS is computed, where registers allow that.
template <class DtypeT, int DimQK, int DimV, int BlockM_, int BlockN_, bool LongestFirst_,
          bool EarlyValues_>
struct BackwardConfig {
  using Dtype = DtypeT;
  static constexpr int kDimQK = DimQK, kDimV = DimV, kBlockM = BlockM_, kBlockN = BlockN_;
  static constexpr bool kLongestFirst = LongestFirst_, kEarlyValues = EarlyValues_;
  static constexpr int kWarpgroups = BlockN_ / 64;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 240;
  // dQ of a query block: the part of each warpgroup.
  static constexpr bool kSplitColumns = BlockM_ == 64 && kWarpgroups > 1;
  static constexpr int kSumColumns = kSplitColumns ? 64 : DimQK;
  static constexpr int kSumThreads = 128 * kWarpgroups;
  static constexpr int kSumFloats = kSumThreads * kSumColumns / 2;
  static constexpr int kTileDimQK = kSplitColumns ? 64 * kWarpgroups : DimQK;
  FA3_DEVICE static int sum_row(int part) { return kSplitColumns ? 0 : 64 * part; }
  FA3_DEVICE static int sum_column(int part) { return kSplitColumns ? 64 * part : 0; }
  static_assert(DimQK % 8 == 0 && DimV % 8 == 0 && DimQK <= 128 && DimV <= 128, "head dims");
  static_assert(kSplitColumns || BlockM_ == 64 * kWarpgroups, "tile");
};

template <class AuxT>
struct BackwardParams {
  TensorMap q, k, v, dout;
  float* dq_sums;
  const float* rows;
  char *dk, *dv;
  RowStrides dk_at, dv_at;
  TileOrder order;  // its query blocks are KV blocks here, its heads KV heads
  int group, queries, keys;
  int query_blocks;
  AuxT aux;
};

template <class Config, class Variant>
struct AttentionBackward {
  using Dtype = typename Config::Dtype;
  using Params = BackwardParams<typename Variant::Aux>;
  using At = typename Variant::At;
  static constexpr int kM = Config::kBlockM, kN = Config::kBlockN;
  using QTile = OperandTile<Config::kTileDimQK, kM>;
  using OTile = OperandTile<Config::kDimV, kM>;
  using KTile = OperandTile<Config::kTileDimQK, kN>;
  using VTile = OperandTile<Config::kDimV, kN>;

  // dS^T in shared memory: panels of 64 queries, rows of a key each.
  static constexpr int kScorePanelBytes = kN * 128;
  static constexpr int kScoreBytes = kM / 64 * kScorePanelBytes;
  static constexpr int kRowBytes = 4 * kRowTerms<Variant> * kM;

  // A stage holds a query block's Q, dO and row terms.
  static constexpr int kStages = 2;
  using Pipe = PipelineState<kStages>;
  static constexpr int kStageBytes = QTile::kBytes + OTile::kBytes + kRowBytes;

  static constexpr int kAtK = 0;
  static constexpr int kAtV = kAtK + KTile::kBytes;
  static constexpr int kAtQ = kAtV + VTile::kBytes;
  static constexpr int kAtO = kAtQ + kStages * QTile::kBytes;
  static constexpr int kAtScores = kAtO + kStages * OTile::kBytes;
  static constexpr bool kBulkAdd = false;
  static constexpr int kAtSums = kAtScores + kScoreBytes;
  static constexpr int kAtRows = kAtSums + (kBulkAdd ? Config::kSumFloats * 4 : 0);
  static constexpr int kAtBarriers = kAtRows + kStages * kRowBytes;
  enum Barrier {
    kFull, kEmpty = kFull + kStages,
    kKVFull = kEmpty + kStages, kKVEmpty,
    kScoresFull, kScoresEmpty,
    kTileFull, kTileEmpty = kTileFull + 2,
    kBarriers = kTileEmpty + 2
  };
  static constexpr int kAtTiles = round_up(kAtBarriers + 8 * kBarriers, 16);
  static constexpr int kSharedBytes = kAtTiles + 32 + 1024;  // and room to align the base
  static constexpr int kSharedLimit = 232448;
  static_assert(kSharedBytes <= kSharedLimit, "the tile needs more shared memory than there is");

  // Row terms of dS are loaded under dP where there are registers for them.
  static constexpr bool kEarlyRows = kM == 64;

  const Params& p;
  uint32_t shared;

  FA3_DEVICE uint32_t barrier(int which) const { return shared + kAtBarriers + 8 * which; }

  FA3_DEVICE At site(const TileCoord& tile) const {
    return {p.aux, tile.batch, tile.head * p.group, p.queries, p.keys};
  }

  // Of a query block among those of all heads; fewer than 2^31, as each has KBs of its own.
  FA3_DEVICE int block_index(int block, int head, int batch) const {
    return (batch * (p.order.heads * p.group) + head) * p.query_blocks + block;
  }

  FA3_DEVICE TileRing ring() const {
    return {shared + kAtTiles, barrier(kTileFull), barrier(kTileEmpty)};
  }

  FA3_DEVICE void init_barriers() const {
    constexpr int consumer_warps = 4 * Config::kWarpgroups;
    for (int i = 0; i < kBarriers; ++i) {
      bool loaded = i < kEmpty || i == kKVFull || (i >= kTileFull && i < kTileEmpty);
      mbarrier_init(barrier(i), loaded ? 1 : consumer_warps);
    }
    mbarrier_init_fence();
  }

  // ---- producer: one thread ----

  FA3_DEVICE void load(Pipe at, int block, int head, int batch) const {
    mbarrier_wait(barrier(kEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = barrier(kFull + at.stage());
    mbarrier_expect(full, kStageBytes);
    QTile::load(shared + kAtQ + at.stage() * QTile::kBytes, p.q, full, kEvictLast, block * kM,
                head, batch);
    OTile::load(shared + kAtO + at.stage() * OTile::kBytes, p.dout, full, kEvictLast, block * kM,
                head, batch);
    bulk_load(shared + kAtRows + at.stage() * kRowBytes,
              p.rows + static_cast<int64_t>(block_index(block, head, batch)) * (kRowBytes / 4),
              kRowBytes, full);
  }

  FA3_DEVICE void produce() const {
    TileRing tiles = ring();
    PipelineState<1> kv;
    Pipe at;
    for (TileQueue<Config::kLongestFirst> queue;; queue.next(p.order)) {
      TileCoord tile{-1, 0, 0};
      bool more = queue.index < p.order.tiles;
      if (more) {
        tile = p.order.template coord<Config::kLongestFirst>(queue.index);
        // Of a causal head the first KV block meets the most queries.
        if (Config::kLongestFirst)
          tile.query_block = p.order.query_blocks - 1 - tile.query_block;
      }
      tiles.publish(tile);
      if (!more) break;
      queue.take(p.order);
      QuerySequence seq = query_sequence<Variant, kM, kN>(site(tile), tile.query_block);
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
        for (int block = seq.first; block < seq.first + seq.count; ++block) {
          load(at, block, head, tile.batch);
          at.advance();
        }
      }
    }
  }

  // ---- consumers ----

  struct Consumer {
    int warpgroup, lane;
    Pipe at;  // dS^T has one stage, which is passed as often
    PipelineState<1> kv;
  };

  struct TileTerms {
    At at;
    typename Variant::Head head;
    typename Variant::Col col[2];
    int kv[2];  // past the last key: the last
    bool exists[2], inside[2];  // whether it is a key, and one that the column mask allows
    float scale, slope;
  };

  FA3_DEVICE void release(int which, int lane) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier(which));
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

  FA3_DEVICE void issue_scores(const Consumer& c, float (&s)[kM / 2]) const {
    issue_inner<KTile, QTile, Config::kDimQK>(
        s, shared + kAtK + c.warpgroup * 64 * KTile::kSwizzle,
        q_tile(c));
  }

  FA3_DEVICE void issue_dp(const Consumer& c, float (&dp)[kM / 2]) const {
    issue_inner<VTile, OTile, Config::kDimV>(
        dp, shared + kAtV + c.warpgroup * 64 * VTile::kSwizzle,
        o_tile(c));
  }

  // dQ = dS K, this warpgroup's part; left running.
  FA3_DEVICE void issue_dq(const Consumer& c, float (&dq)[Config::kSumColumns / 2]) const {
    uint32_t a = shared + kAtScores, b = shared + kAtK;
    if constexpr (Config::kSplitColumns) b += c.warpgroup * KTile::kPanelBytes;
    else a += c.warpgroup * kScorePanelBytes;
    a = Descriptor<128>::low(a, kScorePanelBytes);
    b = KTile::Desc::low(b, KTile::kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kN / 16; ++i)
      Wgmma<Dtype, Config::kSumColumns>::tt(
          dq, Descriptor<128>::make(a + i * 16 * 128 / 16),
          KTile::Desc::make(b + i * 16 * KTile::kSwizzle / 16), i > 0);
    wgmma_commit();
  }

  // Each lane's share of a row term of the stage's queries, in the order of accumulator columns.
  using RowValues = float[kM / 4];
  FA3_DEVICE uint32_t row_address(const Consumer& c, int term) const {
    return shared + kAtRows + c.at.stage() * kRowBytes + 4 * kM * term + 16 * (c.lane % 4);
  }
  FA3_DEVICE void load_rows(const Consumer& c, int term, RowValues& x) const {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) load_shared(x + 4 * i, row_address(c, term) + 64 * i);
  }

  // P^T of one query block in place of S^T; and, where the derivative is not constant, dS^T in
  // place of dP^T.
  template <bool Masked>
  FA3_DEVICE void weigh(const Consumer& c, const TileTerms& t, float (&s)[kM / 2],
                        float (&dp)[kM / 2], const RowValues& lse, int block) const {
    constexpr bool clamped = Masked || Variant::kScore;
    int q0 = block * kM + 2 * (c.lane % 4);
    RowValues delta, norm;
    if constexpr (Variant::kDerivative) load_rows(c, 1, delta);
    if constexpr (Variant::kWideScores) load_rows(c, 2, norm);
    float base[2] = {0.0f, 0.0f};
    if constexpr (Variant::kAffine) {
#pragma unroll
      for (int r = 0; r < 2; ++r) base[r] = t.slope * static_cast<float>(t.kv[r] - q0);
    }
#pragma unroll
    for (int j = 0; j < kM / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int q = q0 + 8 * j + e;
        if constexpr (clamped) q = min(q, p.queries - 1);
        auto row = Variant::row(t.at, t.head, q);
        float offset = lse[2 * j + e];
        if constexpr (Variant::kAffine)
          offset = fmaf(t.slope * t.scale, static_cast<float>(8 * j + e), offset);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int i = 4 * j + 2 * r + e;
          float x = s[i];
          float d = 1.0f;
          if constexpr (Variant::kDerivative)
            d = Variant::derivative(x, t.at, t.head, row, t.col[r], q, t.kv[r], 0.0f);
          if constexpr (Variant::kScore)
            x = Variant::score(x, t.at, t.head, row, t.col[r], q, t.kv[r], 0.0f);
          if constexpr (Variant::kAffine) x += base[r];
          float exponent = fmaf(x, t.scale, -offset);
          if constexpr (Variant::kWideScores)
            exponent = fmaf(x - offset, t.scale, -norm[2 * j + e]);
          float weight = exp2_approx(exponent);
          if constexpr (Masked) {
            bool seen = t.inside[r];
            if constexpr (Variant::kRowEnd)
              seen = seen && t.kv[r] < Variant::row_end(t.at, t.head, row, q);
            if constexpr (Variant::kRowBegin)
              seen = seen && t.kv[r] >= Variant::row_begin(t.at, t.head, row, q);
            if constexpr (Variant::kMask)
              seen = seen && Variant::mask(t.at, t.head, row, t.col[r], q, t.kv[r], 0.0f);
            if (!seen) weight = 0.0f;
          }
          s[i] = weight;
          if constexpr (Variant::kDerivative) {
            float ds = weight * (dp[i] - delta[2 * j + e]) * d;
            if constexpr (Masked) ds = weight == 0.0f ? 0.0f : ds;
            dp[i] = ds;
          }
        }
      }
    }
  }

  // dS^T in place of dP^T, from P^T.
  FA3_DEVICE void differentiate(const Consumer& c, const float (&weights)[kM / 2],
                                float (&dp)[kM / 2], const RowValues& delta) const {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      float own[4];
      if constexpr (!kEarlyRows) load_shared(own, row_address(c, 1) + 64 * i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        int column = j / 4 * 2 + j % 2;
        float& x = dp[8 * i + j];
        x = weights[8 * i + j] * (x - (kEarlyRows ? delta[4 * i + column] : own[column]));
      }
    }
  }

  FA3_DEVICE static void pack_all(uint32_t (&to)[kM / 4], const float (&x)[kM / 2]) {
#pragma unroll
    for (int i = 0; i < kM / 4; ++i) to[i] = pack<Dtype>(x[2 * i], x[2 * i + 1]);
  }

  // This warpgroup's keys of dS^T, for all of them to multiply with K.
  FA3_DEVICE void share(Consumer& c, const uint32_t (&ds)[kM / 4]) const {
    mbarrier_wait(barrier(kScoresEmpty), ~c.at.passed & 1);
    int matrix = c.lane / 8, line = c.lane % 8;
    int row = c.warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + matrix % 2 * 8 + line;
    uint32_t to = shared + kAtScores + row * 128;
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      int piece = 2 * i + matrix / 2;  // of eight queries
      store_matrices(to + i / 4 * kScorePanelBytes + ((piece % 8 ^ line) << 4), ds[4 * i],
                     ds[4 * i + 1], ds[4 * i + 2], ds[4 * i + 3]);
    }
    fence_proxy_async();
    release(kScoresFull, c.lane);
  }

  FA3_DEVICE void add_dq(const Consumer& c, const float (&dq)[Config::kSumColumns / 2],
                         int block) const {
    constexpr int count = Config::kSumColumns / 2;
    int warp = threadIdx.x / 32 - 4;
    float* to = p.dq_sums + static_cast<int64_t>(block) * Config::kSumFloats + warp * count * 32;
    if constexpr (kBulkAdd) {
      uint32_t from = shared + kAtSums + warp * count * 128;
      if (c.lane == 0) bulk_wait_read();
      __syncwarp();
#pragma unroll
      for (int j = 0; j < count / 4; ++j)
        store_shared(from + j * 512 + c.lane * 16, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2],
                     dq[4 * j + 3]);
      fence_proxy_async();
      __syncwarp();
      if (c.lane == 0) {
        bulk_add(to, from, count * 128);
        bulk_commit();
      }
    } else {
#pragma unroll
      for (int j = 0; j < count / 4; ++j)
        add_global(to + j * 128 + c.lane * 4, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2],
                   dq[4 * j + 3]);
    }
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

  // P^T, packed too, in place of the scores, and dP^T. Nothing is left running: ptxas wants that at
  // the end of a loop's body.
  FA3_DEVICE void prepare(Consumer& c, const TileTerms& t, float (&s)[kM / 2], float (&dp)[kM / 2],
                          uint32_t (&weights)[kM / 4], const RowValues& lse, RowValues& delta,
                          int block, bool masked) const {
    wgmma_pin(s);
    issue_dp(c, dp);
    if constexpr (Variant::kDerivative) {
      wgmma_wait<0>();
      wgmma_pin(dp);
    }
    if (masked) weigh<true>(c, t, s, dp, lse, block);
    else weigh<false>(c, t, s, dp, lse, block);
    pack_all(weights, s);
    if constexpr (!Variant::kDerivative) {
      if constexpr (kEarlyRows) load_rows(c, 1, delta);
      wgmma_wait<0>();
      wgmma_pin(dp);
    }
  }

  FA3_DEVICE void attend(Consumer& c, const TileCoord& tile, const QuerySequence& seq) const {
    TileTerms t = terms(c, tile);
    int sums = block_index(0, t.at.head, tile.batch);
    int block = seq.first, last = seq.first + seq.count - 1;
    int left = seq.count * p.group;
    float s[kM / 2], dp[kM / 2];
    float dk[Config::kDimQK / 2], dv[Config::kDimV / 2];
    uint32_t weights[kM / 4];
    RowValues lse, delta;
#pragma unroll
    for (int i = 0; i < Config::kDimQK / 2; ++i) dk[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < Config::kDimV / 2; ++i) dv[i] = 0.0f;
    mbarrier_wait(barrier(kKVFull), c.kv.parity());
    wait_full(c);
    issue_scores(c, s);
    load_rows(c, 0, lse);
    wgmma_wait<0>();
    float dq[Config::kSumColumns / 2];
    for (;;) {
      uint32_t ds[kM / 4];
      prepare(c, t, s, dp, weights, lse, delta, block, seq.masked(block));
      if constexpr (Config::kEarlyValues)
        issue_outer<OTile, Config::kDimV>(dv, weights, o_tile(c));
      if constexpr (!Variant::kDerivative) differentiate(c, s, dp, delta);
      pack_all(ds, dp);
      if constexpr (!Config::kEarlyValues)
        issue_outer<OTile, Config::kDimV>(dv, weights, o_tile(c));
      share(c, ds);
      wgmma_wait<0>();
      wgmma_hold(weights);
      issue_outer<QTile, Config::kDimQK>(dk, ds, q_tile(c));
      mbarrier_wait(barrier(kScoresFull), c.at.passed & 1);
      issue_dq(c, dq);
      wgmma_wait<0>();
      wgmma_pin(dq);
      wgmma_hold(ds);
      __syncwarp();
      if (c.lane == 0) {
        mbarrier_arrive(barrier(kEmpty + c.at.stage()));
        mbarrier_arrive(barrier(kScoresEmpty));
      }
      c.at.advance();
      if (--left == 0) break;
      wait_full(c);
      issue_scores(c, s);
      load_rows(c, 0, lse);
      add_dq(c, dq, sums + block);
      wgmma_wait<0>();
      if (block++ == last) {
        block = seq.first;
        sums += p.query_blocks;
        ++t.at.head;
        refresh(t);
      }
    }
    add_dq(c, dq, sums + block);
    release(kKVEmpty, c.lane);
    c.kv.advance();
    wgmma_pin(dk);
    wgmma_pin(dv);
    int kv0 = first_key(c, tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int kv = kv0 + 8 * r;
      bool inside = kv < p.keys;
      store_row<Dtype, Config::kDimQK>(dk, r, Variant::kFactor, inside,
                                       p.dk + 2 * p.dk_at.at(tile.batch, tile.head, kv));
      store_row<Dtype, Config::kDimV>(dv, r, 1.0f, inside,
                                      p.dv + 2 * p.dv_at.at(tile.batch, tile.head, kv));
    }
  }

  FA3_DEVICE TileTerms terms(const Consumer& c, const TileCoord& tile) const {
    TileTerms t{site(tile)};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int kv = first_key(c, tile) + 8 * r;
      t.exists[r] = t.inside[r] = kv < p.keys;
      t.kv[r] = min(kv, p.keys - 1);
    }
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
      t.col[r] = Variant::col(t.at, t.head, t.kv[r]);
      if constexpr (Variant::kColumnMask)
        t.inside[r] = t.exists[r] && Variant::column_mask(t.at, t.head, t.col[r], t.kv[r]);
    }
  }

  // The first of this thread's two keys, eight apart.
  FA3_DEVICE static int first_key(const Consumer& c, const TileCoord& tile) {
    return tile.query_block * kN + c.warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + c.lane / 4;
  }

  // dK and dV of keys that no query sees.
  FA3_DEVICE void store_zeros(const Consumer& c, const TileCoord& tile) const {
    constexpr uint32_t nothing[4] = {};
    int row = threadIdx.x % 128 / 2, half = threadIdx.x % 2;
    int kv = tile.query_block * kN + c.warpgroup * 64 + row;
    char* dk = p.dk + 2 * p.dk_at.at(tile.batch, tile.head, kv);
    char* dv = p.dv + 2 * p.dv_at.at(tile.batch, tile.head, kv);
    for (int i = half; i < Config::kDimQK / 8; i += 2) store_if(kv < p.keys, dk + 16 * i, nothing);
    for (int i = half; i < Config::kDimV / 8; i += 2) store_if(kv < p.keys, dv + 16 * i, nothing);
  }

  FA3_DEVICE void consume() const {
    Consumer c;
    c.warpgroup = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
    c.lane = threadIdx.x % 32;
    TileRing tiles = ring();
    for (;;) {
      TileCoord tile = tiles.receive();
      if (tile.query_block < 0) break;
      QuerySequence seq = query_sequence<Variant, kM, kN>(site(tile), tile.query_block);
      if (seq.count > 0) attend(c, tile, seq);
      else store_zeros(c, tile);
    }
    if (kBulkAdd && c.lane == 0) bulk_wait();
  }

  FA3_DEVICE static void run(const Params& p) {
    extern __shared__ char memory[];
    AttentionBackward self{p, (shared_address(memory) + 1023) & ~1023u};
    if (threadIdx.x == 0) self.init_barriers();
    __syncthreads();
    if (threadIdx.x < 128) {
      shrink_registers<Config::kProducerRegisters>();
      if (threadIdx.x == 0) self.produce();
    } else {
      grow_registers<Config::kConsumerRegisters>();
      self.consume();
    }
  }
};

}  // namespace fa3
