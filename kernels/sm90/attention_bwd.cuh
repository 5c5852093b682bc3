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
#include "sm90/backward_block.cuh"

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
  static constexpr int kFirstColumns = kSplitColumns ? 64 : DimQK, kLastColumns = kFirstColumns;
  static constexpr int kSumThreads = 128 * kWarpgroups;
  static constexpr int kSumFloats = kSumThreads * kFirstColumns / 2;
  static constexpr int kTileDimQK = kSplitColumns ? 64 * kWarpgroups : DimQK;
  static constexpr int kScoreStages = 1, kScoreWarps = 4 * kWarpgroups, kWeightBytes = 0;
  FA3_DEVICE static int key_row(int warpgroup) { return 64 * warpgroup; }
  FA3_DEVICE static int sum_row(int part) { return kSplitColumns ? 0 : 64 * part; }
  FA3_DEVICE static int sum_column(int part) { return kSplitColumns ? 64 * part : 0; }
  static_assert(DimQK % 8 == 0 && DimV % 8 == 0 && DimQK <= 128 && DimV <= 128, "head dims");
  static_assert(kSplitColumns || BlockM_ == 64 * kWarpgroups, "tile");
};

template <class Config, class Variant>
struct AttentionBackward : BackwardBlock<Config, Variant> {
  using Block = BackwardBlock<Config, Variant>;
  using typename Block::Consumer, typename Block::Dtype, typename Block::OTile,
      typename Block::Params, typename Block::QTile, typename Block::RowValues,
      typename Block::TileTerms;
  using Block::barrier, Block::kM, Block::kN, Block::o_tile, Block::p, Block::q_tile,
      Block::release, Block::shared;
  static constexpr int kColumns = Config::kFirstColumns;

  // Row terms of dS are loaded under dP where there are registers for them.
  static constexpr bool kEarlyRows = kM == 64;

  // dS^T in place of dP^T, from P^T.
  FA3_DEVICE void differentiate(const Consumer& c, const float (&weights)[kM / 2],
                                float (&dp)[kM / 2], const RowValues& delta) const {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      float own[4];
      if constexpr (!kEarlyRows) load_shared(own, this->row_address(c, 1) + 64 * i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        int column = j / 4 * 2 + j % 2;
        float& x = dp[8 * i + j];
        x = weights[8 * i + j] * (x - (kEarlyRows ? delta[4 * i + column] : own[column]));
      }
    }
  }

  // P^T, packed too, in place of the scores, and dP^T. Nothing is left running: ptxas wants that at
  // the end of a loop's body.
  FA3_DEVICE void prepare(Consumer& c, const TileTerms& t, float (&s)[kM / 2], float (&dp)[kM / 2],
                          uint32_t (&weights)[kM / 4], const RowValues& lse, RowValues& delta,
                          int block, bool masked) const {
    wgmma_pin(s);
    this->issue_dp(c, dp, 64 * c.warpgroup);
    if constexpr (Variant::kDerivative) {
      wgmma_wait<0>();
      wgmma_pin(dp);
    }
    if (masked) this->template weigh<true, true>(c, t, s, dp, lse, block);
    else this->template weigh<false, true>(c, t, s, dp, lse, block);
    Block::pack_all(weights, s);
    if constexpr (!Variant::kDerivative) {
      if constexpr (kEarlyRows) this->load_rows(c, 1, delta);
      wgmma_wait<0>();
      wgmma_pin(dp);
    }
  }

  // Columns past the head dim are no part of the sums.
  FA3_DEVICE void add_part(const Consumer& c, const float (&dq)[kColumns / 2], int block) const {
    this->template add_dq<kColumns>(c, dq, block);
  }

  FA3_DEVICE void attend(Consumer& c, const TileCoord& tile, const QuerySequence& seq) const {
    TileTerms t = this->terms(c, tile);
    int sums = this->block_index(0, t.at.head, tile.batch);
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
    mbarrier_wait(barrier(Block::kKVFull), c.kv.parity());
    this->wait_full(c);
    this->issue_scores(c, s, 64 * c.warpgroup);
    this->load_rows(c, 0, lse);
    wgmma_wait<0>();
    float dq[kColumns / 2];
    uint32_t scores = shared + Block::kAtScores;
    int column = 0;
    if constexpr (Config::kSplitColumns) column = 64 * c.warpgroup;
    uint32_t own_scores = scores;
    if constexpr (!Config::kSplitColumns) own_scores += c.warpgroup * Block::kScorePanelBytes;
    for (;;) {
      uint32_t ds[kM / 4];
      prepare(c, t, s, dp, weights, lse, delta, block, seq.masked(block));
      if constexpr (Config::kEarlyValues)
        Block::template issue_outer<OTile, Config::kDimV>(dv, weights, o_tile(c));
      if constexpr (!Variant::kDerivative) differentiate(c, s, dp, delta);
      Block::pack_all(ds, dp);
      if constexpr (!Config::kEarlyValues)
        Block::template issue_outer<OTile, Config::kDimV>(dv, weights, o_tile(c));
      mbarrier_wait(barrier(Block::kScoresEmpty), ~c.at.passed & 1);
      Block::share(c, ds, scores, 64 * c.warpgroup);
      release(Block::kScoresFull, c.lane);
      wgmma_wait<0>();
      wgmma_hold(weights);
      Block::template issue_outer<QTile, Config::kDimQK>(dk, ds, q_tile(c));
      mbarrier_wait(barrier(Block::kScoresFull), c.at.passed & 1);
      this->template issue_dq<kColumns>(dq, own_scores, column);
      wgmma_wait<0>();
      wgmma_pin(dq);
      wgmma_hold(ds);
      __syncwarp();
      if (c.lane == 0) {
        mbarrier_arrive(barrier(Block::kEmpty + c.at.stage()));
        mbarrier_arrive(barrier(Block::kScoresEmpty));
      }
      c.at.advance();
      if (--left == 0) break;
      this->wait_full(c);
      this->issue_scores(c, s, 64 * c.warpgroup);
      this->load_rows(c, 0, lse);
      add_part(c, dq, sums + block);
      wgmma_wait<0>();
      if (block++ == last) {
        block = seq.first;
        sums += p.query_blocks;
        ++t.at.head;
        Block::refresh(t);
      }
    }
    add_part(c, dq, sums + block);
    release(Block::kKVEmpty, c.lane);
    c.kv.advance();
    wgmma_pin(dk);
    wgmma_pin(dv);
    this->template store<Config::kDimQK>(c, tile, dk, Variant::kFactor, p.dk, p.dk_at);
    this->template store<Config::kDimV>(c, tile, dv, 1.0f, p.dv, p.dv_at);
  }

  FA3_DEVICE void consume() const {
    Consumer c = Block::consumer();
    TileRing tiles = this->ring();
    for (;;) {
      TileCoord tile = tiles.receive();
      if (tile.query_block < 0) break;
      QuerySequence seq =
          query_sequence<Variant, kM, kN>(this->site(tile), tile.query_block);
      if (seq.count > 0) attend(c, tile, seq);
      else this->store_zeros(tile);
    }
  }

  FA3_DEVICE static void run(const Params& p) {
    extern __shared__ char memory[];
    AttentionBackward self{{p, (shared_address(memory) + 1023) & ~1023u}};
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
