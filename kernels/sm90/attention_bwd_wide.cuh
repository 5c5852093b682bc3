// Attention backward on Hopper for head dims beyond 128, where dK and dV of 64 keys fill the
// registers of a warpgroup each. The two consumer warpgroups take a product each, of the same 64
// keys and 64 queries, and hand on what the other needs through shared memory:
//   weights   S^T = K Q^T, P^T = exp2(S^T - LSE), dV += P^T dO; hands P^T dscore/ds to the other
//   scores    dP^T = V dO^T, dS^T = P^T (dP^T - delta) dscore/ds, dK += dS^T Q; shares dS^T
// and some columns of dQ = dS K each, the weights' warpgroup one query block later: it is ahead.
#pragma once
#include "sm90/backward_consumer.cuh"

namespace fa3 {

template <class DtypeT, int DimQK, int DimV, bool LongestFirst_, bool Grouped_, bool Bits_,
          bool InTurn_, bool Finishes_, bool Beside_>
struct WideBackwardConfig {
  using Dtype = DtypeT;
  static constexpr int kDimQK = DimQK, kDimV = DimV, kBlockM = 64, kBlockN = 64;
  static constexpr bool kLongestFirst = LongestFirst_, kGrouped = Grouped_, kBits = Bits_;
  static constexpr bool kInTurn = InTurn_, kFinishes = Finishes_;
  static constexpr bool kBeside = Beside_;
  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kTileDimQK = DimQK;
  // Columns of dQ: whole panels for the first warpgroup.
  static constexpr int kFirstColumns = DimQK > 128 ? 128 : round_up(DimQK / 2, 64);
  static constexpr int kLastColumns = DimQK - kFirstColumns;
  static constexpr int kSumThreads = 256, kSumFloats = 64 * DimQK;
  static constexpr int kScoreStages = 2, kScoreWarps = 4, kWeightBytes = 2 * 64 * 64;
  FA3_DEVICE static int key_row(int) { return 0; }
  FA3_DEVICE static int sum_row(int) { return 0; }
  FA3_DEVICE static constexpr int sum_column(int part) { return part == 0 ? 0 : kFirstColumns; }
  static_assert(DimQK % 8 == 0 && DimV % 8 == 0 && DimQK <= 256 && DimV <= 256, "head dims");
  static_assert(DimQK > 64, "the columns of dQ are shared out");
};

template <class Config, class Variant>
struct WideAttentionBackward : BackwardConsumer<Config, Variant> {
  using Block = BackwardConsumer<Config, Variant>;
  using typename Block::Consumer, typename Block::Dtype, typename Block::ElementBits,
      typename Block::OTile, typename Block::Params, typename Block::Pipe, typename Block::QTile,
      typename Block::RowValues, typename Block::TileTerms;
  using Block::barrier, Block::kM, Block::kN, Block::o_tile, Block::p, Block::q_tile,
      Block::release, Block::shared;

  FA3_DEVICE uint32_t scores(Pipe at) const {
    return shared + Block::kAtScores + at.stage() * Block::kScoreBytes;
  }

  // This thread's part of P^T, which the same thread of the other warpgroup takes: slots of 16
  // bytes, side by side for a warp.
  FA3_DEVICE uint32_t handed() const {
    return shared + Block::kAtWeights + threadIdx.x % 128 * 16;
  }

  FA3_DEVICE void hand_over(const Consumer& c, const uint32_t (&x)[kM / 4]) const {
    mbarrier_wait(barrier(Block::kWeightsEmpty), ~c.at.passed & 1);
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
      store_words(handed() + i * 2048, x + 4 * i);
    release(Block::kWeightsFull, c.lane);
  }

  FA3_DEVICE void take_over(const Consumer& c, uint32_t (&x)[kM / 4]) const {
    mbarrier_wait(barrier(Block::kWeightsFull), c.at.passed & 1);
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
      load_words(x + 4 * i, handed() + i * 2048);
    release(Block::kWeightsEmpty, c.lane);
  }

  // The warpgroup of P and dV.
  FA3_DEVICE void attend_weights(Consumer& c, const TileCoord& tile,
                                 const QuerySequence& seq) const {
    TileTerms t = this->terms(c, tile);
    int sums = this->first_sums(tile);
    int i = 0;
    int before = -1;
    float dv[Config::kDimV / 2];
#pragma unroll
    for (int i = 0; i < Config::kDimV / 2; ++i) dv[i] = 0.0f;
    mbarrier_wait(barrier(Block::kKVFull), c.kv.parity());
#pragma unroll 1
    for (int left = this->steps(seq); left > 0; --left) {
      float s[kM / 2], slopes[kM / 2], dq[Config::kFirstColumns / 2];
      uint32_t weights[kM / 4];
      RowValues lse;
      this->wait_full(c);
      this->issue_scores(c, s, 0);
      this->load_lse(c, lse);
      ElementBits seen = {};
      if constexpr (Block::kSeenBits)
        if (seq.masked(i, seq.block(i))) seen = this->seen_bits(c, t, seq.block(i));
      wgmma_wait<0>();
      wgmma_pin(s);
      int block = seq.block(i);
      if (seq.masked(i, block))
        this->template weigh<true, false>(c, t, s, slopes, lse, block, seen, seen);
      else
        this->template weigh<false, false>(c, t, s, slopes, lse, block, seen, seen);
      Block::pack_all(weights, s);
      if constexpr (Variant::kDerivative) {
        uint32_t scaled[kM / 4];
        Block::pack_all(scaled, slopes);
        hand_over(c, scaled);
      } else {
        hand_over(c, weights);
      }
      Block::template issue_outer<OTile, Config::kDimV>(dv, weights, o_tile(c));
      // Of the first block there is no dS yet: the product of what lies there is not used.
      Pipe previous{c.at.passed - 1};
      if (before >= 0)
        mbarrier_wait(barrier(Block::kScoresFull + previous.stage()), previous.parity());
      this->template issue_dq<Config::kFirstColumns>(dq, scores(previous), 0);
      wgmma_wait<0>();
      wgmma_pin(dq);
      wgmma_hold(weights);
      release(Block::kEmpty + c.at.stage(), c.lane);
      if (before >= 0) {
        release(Block::kScoresEmpty + previous.stage(), c.lane);
        this->template add_dq<Config::kFirstColumns>(c, dq, before);
      }
      c.at.advance();
      before = sums + block;
      if (++i == seq.count && Config::kGrouped) {
        i = 0;
        sums += p.query_blocks;
        ++t.at.head;
        Block::refresh(t);
      }
    }
    float dq[Config::kFirstColumns / 2];
    Pipe previous{c.at.passed - 1};
    mbarrier_wait(barrier(Block::kScoresFull + previous.stage()), previous.parity());
    this->template issue_dq<Config::kFirstColumns>(dq, scores(previous), 0);
    wgmma_wait<0>();
    wgmma_pin(dq);
    release(Block::kScoresEmpty + previous.stage(), c.lane);
    release(Block::kKVEmpty, c.lane);
    this->template add_dq<Config::kFirstColumns>(c, dq, before);
    wgmma_pin(dv);
    this->template store<Config::kDimV>(c, tile, dv, 1.0f, p.dv, p.dv_at);
  }

  // The warpgroup of dS and dK.
  FA3_DEVICE void attend_scores(Consumer& c, const TileCoord& tile,
                                const QuerySequence& seq) const {
    typename Block::At at = this->site(tile);
    int sums = this->first_sums(tile);
    int i = 0;
    float dk[Config::kDimQK / 2];
#pragma unroll
    for (int i = 0; i < Config::kDimQK / 2; ++i) dk[i] = 0.0f;
    mbarrier_wait(barrier(Block::kKVFull), c.kv.parity());
#pragma unroll 1
    for (int left = this->steps(seq); left > 0; --left) {
      float dp[kM / 2], dq[Config::kLastColumns / 2];
      uint32_t weights[kM / 4], ds[kM / 4];
      RowValues delta;
      int block = seq.block(i);
      this->wait_full(c);
      this->issue_dp(c, dp, 0);
      this->load_rows(c, 1, delta);
      take_over(c, weights);
      wgmma_wait<0>();
      wgmma_pin(dp);
#pragma unroll
      for (int i = 0; i < kM / 4; ++i) {
        float2 weight = unpack<Dtype>(weights[i]);
        int column = i / 2 * 2;
        ds[i] = pack<Dtype>(weight.x * (dp[2 * i] - delta[column]),
                            weight.y * (dp[2 * i + 1] - delta[column + 1]));
      }
      int stage = c.at.stage();
      mbarrier_wait(barrier(Block::kScoresEmpty + stage), c.at.parity() ^ 1);
      this->share(c, ds, Block::kAtScores + stage * Block::kScoreBytes);
      release(Block::kScoresFull + stage, c.lane);
      Block::template issue_outer<QTile, Config::kDimQK>(dk, ds, q_tile(c));
      mbarrier_wait(barrier(Block::kScoresFull + stage), c.at.parity());
      if (Variant::kTileGradient && threadIdx.x == 256)
        this->store_tile(Block::kAtScores + stage * Block::kScoreBytes, tile.query_block, block,
                         at.head, at.batch);
      this->template issue_dq<Config::kLastColumns>(dq, scores(c.at), Config::kFirstColumns);
      wgmma_wait<0>();
      wgmma_pin(dq);
      wgmma_hold(ds);
      __syncwarp();
      if (c.lane == 0) {
        if (Variant::kTileGradient) bulk_wait_read();
        mbarrier_arrive(barrier(Block::kEmpty + stage));
        mbarrier_arrive(barrier(Block::kScoresEmpty + stage));
      }
      this->template add_dq<Config::kLastColumns>(c, dq, sums + block);
      c.at.advance();
      if (++i == seq.count && Config::kGrouped) {
        i = 0;
        sums += p.query_blocks;
        ++at.head;
      }
    }
    release(Block::kKVEmpty, c.lane);
    if (Block::kInTurn && threadIdx.x == 256) bulk_wait();  // before the next batch adds
    wgmma_pin(dk);
    this->template store<Config::kDimQK>(c, tile, dk, Variant::kFactor, p.dk, p.dk_at);
  }

  FA3_DEVICE void consume() const {
    this->each_tile([&](Consumer& c, const TileCoord& tile, const QuerySequence& seq) {
      if (c.warpgroup == 0) attend_weights(c, tile, seq);
      else attend_scores(c, tile, seq);
      if constexpr (!Config::kFinishes) c.kv.advance();
    });
  }

  FA3_DEVICE static void run(const Params& p) { run_backward<WideAttentionBackward>(p); }
};

}  // namespace fa3
