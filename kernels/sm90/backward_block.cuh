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
    Pipe at;  // dS^T is passed as often, and so are weights
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
    uint32_t a = Descriptor<128>::low(scores, kScorePanelBytes);
    uint32_t b = KTile::Desc::low(
        shared + kAtK + column / KTile::kPanelColumns * KTile::kPanelBytes, KTile::kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kN / 16; ++i)
      Wgmma<Dtype, Columns>::tt(dq, Descriptor<128>::make(a + i * 16 * 128 / 16),
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

  // P^T of one query block in place of S^T. Where the derivative is not constant: Fused puts dS^T in
  // place of dP^T, otherwise P^T times the derivative goes there.
  template <bool Masked, bool Fused>
  FA3_DEVICE void weigh(const Consumer& c, const TileTerms& t, float (&s)[kM / 2],
                        float (&dp)[kM / 2], const RowValues& lse, int block) const {
    constexpr bool clamped = Masked || Variant::kScore;
    int q0 = block * kM + 2 * (c.lane % 4);
    RowValues delta, norm;
    if constexpr (Variant::kDerivative && Fused) load_rows(c, 1, delta);
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
            float ds = weight * d;
            if constexpr (Fused) ds *= dp[i] - delta[2 * j + e];
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

  // This warpgroup's keys of dS^T, for all of them to multiply with K.
  FA3_DEVICE static void share(const Consumer& c, const uint32_t (&ds)[kM / 4], uint32_t scores,
                               int first_row) {
    int matrix = c.lane / 8, line = c.lane % 8;
    int row = first_row + threadIdx.x / 32 % 4 * 16 + matrix % 2 * 8 + line;
    uint32_t to = scores + row * 128;
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      int piece = 2 * i + matrix / 2;  // of eight queries
      store_matrices(to + i / 4 * kScorePanelBytes + ((piece % 8 ^ line) << 4), ds[4 * i],
                     ds[4 * i + 1], ds[4 * i + 2], ds[4 * i + 3]);
    }
    fence_proxy_async();
  }

  // Adds this warpgroup's part of dQ, of `Columns` columns, to the sums of a query block.
  template <int Columns>
  FA3_DEVICE void add_dq(const Consumer& c, const float (&dq)[Columns / 2], int block) const {
    constexpr int count = Columns / 2;
    float* to = p.dq_sums + static_cast<int64_t>(block) * Config::kSumFloats +
                c.warpgroup * Config::kFirstColumns * 64 + threadIdx.x / 32 % 4 * count * 32 +
                c.lane * 4;
#pragma unroll
    for (int j = 0; j < count / 4; ++j)
      add_global(to + j * 128, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
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
