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
#include "sm90/backward_consumer.cuh"

namespace fa3 {

// BlockM is 64, and the warpgroups share out the columns of dQ; or 64 for each of them, and they
// share out its rows. EarlyValues issues dV while dS is computed, where registers allow that. LateDq
// computes dQ a step later, so that no warpgroup waits for the other's dS. Bits finds what is asked of
// elements under the scores. InTurn: see Block::kInTurn. Finishes: see sm90/query_gradient.cuh.
template <class DtypeT, int DimQK, int DimV, int BlockM_, int BlockN_, bool LongestFirst_,
          bool Grouped_, bool EarlyValues_, bool LateDq_, bool Bits_, bool InTurn_, bool Finishes_>
struct BackwardConfig {
  using Dtype = DtypeT;
  static constexpr int kDimQK = DimQK, kDimV = DimV, kBlockM = BlockM_, kBlockN = BlockN_;
  static constexpr bool kLongestFirst = LongestFirst_, kGrouped = Grouped_;
  static constexpr bool kEarlyValues = EarlyValues_, kLateDq = LateDq_, kBits = Bits_;
  static constexpr bool kInTurn = InTurn_, kFinishes = Finishes_;
  static constexpr bool kBeside = false;
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
  static constexpr int kScoreStages = LateDq_ ? 2 : 1, kScoreWarps = 4 * kWarpgroups, kWeightBytes = 0;
  FA3_DEVICE static int key_row(int warpgroup) { return 64 * warpgroup; }
  FA3_DEVICE static int sum_row(int part) { return kSplitColumns ? 0 : 64 * part; }
  FA3_DEVICE static constexpr int sum_column(int part) { return kSplitColumns ? 64 * part : 0; }
  static_assert(DimQK % 8 == 0 && DimV % 8 == 0 && DimQK <= 128 && DimV <= 128, "head dims");
  static_assert(kSplitColumns || BlockM_ == 64 * kWarpgroups, "tile");
};

template <class Config, class Variant>
struct AttentionBackward : BackwardConsumer<Config, Variant> {
  using Block = BackwardConsumer<Config, Variant>;
  using typename Block::Consumer, typename Block::Dtype, typename Block::ElementBits,
      typename Block::OTile, typename Block::Params, typename Block::QTile,
      typename Block::RowValues, typename Block::TileTerms;
  using Block::barrier, Block::kM, Block::kN, Block::o_tile, Block::p, Block::q_tile,
      Block::release, Block::shared;
  static constexpr int kColumns = Config::kFirstColumns;
  using ScorePipe = PipelineState<Config::kScoreStages>;
  // With LateDq dS is stored as the dense input's gradient a step later too.
  static constexpr bool kLateStore = Variant::kTileGradient && Config::kLateDq;

  // Row terms of dS are loaded under dP where there are registers for them.
  static constexpr bool kEarlyRows = kM == 64;
  // Additions to dQ, eight columns each, that are made under dK rather than under the next scores:
  // all at once fill the queue of the load-store unit.
  static constexpr int kEarlyAdds = Config::kSplitColumns ? 6 : 0;

  // dS^T in place of dP^T, from P^T.
  FA3_DEVICE void differentiate(const Consumer& c, const float (&weights)[kM / 2],
                                float (&dp)[kM / 2], const RowValues& delta,
                                const ElementBits& kept) const {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      float own[4];
      if constexpr (!kEarlyRows) load_shared(own, this->row_address(c, 1) + 64 * i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        int column = j / 4 * 2 + j % 2;
        float& x = dp[8 * i + j];
        if constexpr (Block::kKeptBits) x *= Block::factor_of(kept, 8 * i + j);
        x = weights[8 * i + j] * (x - (kEarlyRows ? delta[4 * i + column] : own[column]));
      }
    }
  }

  // P^T, packed too, in place of the scores, and dP^T. Nothing is left running: ptxas wants that at
  // the end of a loop's body.
  FA3_DEVICE void prepare(Consumer& c, const TileTerms& t, float (&s)[kM / 2], float (&dp)[kM / 2],
                          uint32_t (&weights)[kM / 4], const RowValues& lse, RowValues& delta,
                          int block, bool masked, const ElementBits& seen,
                          const ElementBits& kept) const {
    wgmma_pin(s);
    this->issue_dp(c, dp, 64 * c.warpgroup);
    if constexpr (Block::kTogether) {
      wgmma_wait<0>();
      wgmma_pin(dp);
    }
    if (masked) this->template weigh<true, true>(c, t, s, dp, lse, block, seen, kept);
    else this->template weigh<false, true>(c, t, s, dp, lse, block, seen, kept);
    if constexpr (Block::kKeptBits) Block::pack_kept(weights, s, kept);
    else Block::pack_all(weights, s);
    if constexpr (!Block::kTogether) {
      if constexpr (kEarlyRows) this->load_rows(c, 1, delta);
      wgmma_wait<0>();
      wgmma_pin(dp);
    }
  }

  // What is asked of the elements of a query block, where bits hold it.
  static constexpr bool kBits = Block::kSeenBits || Block::kKeptBits;
  FA3_DEVICE void find_bits(const Consumer& c, const TileTerms& t, const QuerySequence& seq, int i,
                            int block, ElementBits& seen, ElementBits& kept) const {
    if constexpr (Block::kSeenBits)
      if (seq.masked(i, block)) seen = this->seen_bits(c, t, block);
    if constexpr (Block::kKeptBits) kept = this->kept_bits(c, t, block);
  }

  // Whether each warpgroup asks for itself which query blocks see all of its keys, and whether the
  // first one sees none. A causal tile's second block is full for the first warpgroup, and its first
  // one empty for the second.
  // Of a window's queries it is a few percent slower.
  static constexpr bool kOwnBounds = kM == 64 && Config::kLateDq && !Config::kFinishes &&
                                     !Variant::kBlockMap && !Variant::kTileGradient &&
                                     (Variant::kMask || Variant::kRowEnd || Variant::kRowBegin);

  // Of a query block that sees none of this warpgroup's keys: its dS. Its stage is let go of before it
  // is full; what was there before has been, as dS of the step between was waited for.
  FA3_DEVICE void pass_over(Consumer& c) const {
    constexpr uint32_t nothing[kM / 4] = {};
    ScorePipe written{c.at.passed};
    mbarrier_wait(barrier(Block::kScoresEmpty + written.stage()), written.parity() ^ 1);
    this->share(c, nothing, Block::kAtScores + written.stage() * Block::kScoreBytes);
    release(Block::kScoresFull + written.stage(), c.lane);
    if (c.lane == 0) mbarrier_arrive(barrier(Block::kEmpty + c.at.stage()));
    c.at.advance();
  }

  FA3_DEVICE void attend(Consumer& c, const TileCoord& tile, QuerySequence seq) const {
    TileTerms t = this->terms(c, tile);
    int sums = this->first_sums(tile);
    int i = 0, block = seq.block(0);
    int left = this->steps(seq);
    int previous = -1;  // the sums that dQ of the step before goes to, once there is one
    if constexpr (kOwnBounds) {
      QuerySequence own = query_sequence<Variant, kM, 64>(
          this->site(tile), p.map, tile.query_block * Config::kWarpgroups + c.warpgroup);
      seq.full_begin = own.full_begin;
      seq.full_end = own.full_end;
      if (own.first > seq.first && seq.count > 1) {
        pass_over(c);
        previous = sums + block;
        --left;
        block = seq.block(++i);
      }
    }
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
    this->load_lse(c, lse);
    ElementBits seen = {}, kept = {};
    find_bits(c, t, seq, i, block, seen, kept);
    wgmma_wait<0>();
    float dq[kColumns / 2];
    int column = 0;
    if constexpr (Config::kSplitColumns) column = 64 * c.warpgroup;
    int own_rows = Block::kAtScores + (Config::kSplitColumns ? 0 : c.warpgroup * 64 * 128);
    [[maybe_unused]] int previous_block = 0, previous_head = 0;  // and where its dS is stored
    for (;;) {
      uint32_t ds[kM / 4];
      prepare(c, t, s, dp, weights, lse, delta, block, seq.masked(i, block), seen, kept);
      if constexpr (Config::kEarlyValues)
        Block::template issue_outer<OTile, Config::kDimV>(dv, weights, o_tile(c));
      if constexpr (!Block::kTogether) differentiate(c, s, dp, delta, kept);
      Block::pack_all(ds, dp);
      if constexpr (!Config::kEarlyValues)
        Block::template issue_outer<OTile, Config::kDimV>(dv, weights, o_tile(c));
      ScorePipe written{c.at.passed}, read{c.at.passed - (Config::kLateDq ? 1 : 0)};
      mbarrier_wait(barrier(Block::kScoresEmpty + written.stage()), written.parity() ^ 1);
      this->share(c, ds, Block::kAtScores + written.stage() * Block::kScoreBytes);
      release(Block::kScoresFull + written.stage(), c.lane);
      wgmma_wait<0>();
      wgmma_hold(weights);
      // At first there may be no dS to read: the product of what lies there is not used.
      if constexpr (!Config::kLateDq) previous = sums + block;
      bool any = !Config::kLateDq || previous >= 0;
      uint32_t scores = shared + own_rows + read.stage() * Block::kScoreBytes;
      if constexpr (kEarlyAdds == 0)
        Block::template issue_outer<QTile, Config::kDimQK>(dk, ds, q_tile(c));
      if (any) mbarrier_wait(barrier(Block::kScoresFull + read.stage()), read.parity());
      if constexpr (kLateStore) {
        if (any && threadIdx.x == 128)
          this->store_tile(Block::kAtScores + read.stage() * Block::kScoreBytes, tile.query_block,
                           previous_block, previous_head, tile.batch);
      } else if (Variant::kTileGradient && threadIdx.x == 128) {
        this->store_tile(Block::kAtScores, tile.query_block, block, t.at.head, t.at.batch);
      }
      if constexpr (kEarlyAdds > 0) {
        this->template issue_dq<kColumns>(dq, scores, column);
        Block::template issue_outer<QTile, Config::kDimQK>(dk, ds, q_tile(c));
        wgmma_wait<1>();
        wgmma_pin(dq);
        if (any) this->template add_dq<kColumns, 0, kEarlyAdds>(c, dq, previous);
        wgmma_wait<0>();
      } else {
        this->template issue_dq<kColumns>(dq, scores, column);
        wgmma_wait<0>();
        wgmma_pin(dq);
      }
      wgmma_hold(ds);
      __syncwarp();
      if (c.lane == 0) {
        if (Variant::kTileGradient && c.warpgroup == 0) bulk_wait_read();
        mbarrier_arrive(barrier(Block::kEmpty + c.at.stage()));
        if (any) mbarrier_arrive(barrier(Block::kScoresEmpty + read.stage()));
      }
      c.at.advance();
      if (--left == 0) break;
      this->wait_full(c);
      this->issue_scores(c, s, 64 * c.warpgroup);
      this->load_lse(c, lse);
      if (any) this->template add_dq<kColumns, kEarlyAdds, kColumns / 8>(c, dq, previous);
      if constexpr (!kBits) wgmma_wait<0>();
      if constexpr (Config::kLateDq) previous = sums + block;
      if constexpr (kLateStore) previous_block = block, previous_head = t.at.head;
      if (++i == seq.count && Config::kGrouped) {
        i = 0;
        sums += p.query_blocks;
        ++t.at.head;
        Block::refresh(t);
      }
      block = seq.block(i);
      if constexpr (kBits) {
        find_bits(c, t, seq, i, block, seen, kept);
        wgmma_wait<0>();
      }
    }
    if (previous >= 0)
      this->template add_dq<kColumns, kEarlyAdds, kColumns / 8>(c, dq, previous);
    if constexpr (Config::kLateDq) {
      ScorePipe read{c.at.passed - 1};
      mbarrier_wait(barrier(Block::kScoresFull + read.stage()), read.parity());
      if (kLateStore && threadIdx.x == 128) {
        this->store_tile(Block::kAtScores + read.stage() * Block::kScoreBytes, tile.query_block,
                         block, t.at.head, tile.batch);
        bulk_wait_read();
      }
      this->template issue_dq<kColumns>(
          dq, shared + own_rows + read.stage() * Block::kScoreBytes, column);
      wgmma_wait<0>();
      wgmma_pin(dq);
      release(Block::kScoresEmpty + read.stage(), c.lane);
      this->template add_dq<kColumns>(c, dq, sums + block);
    }
    release(Block::kKVEmpty, c.lane);
    if constexpr (!Config::kFinishes) c.kv.advance();
    if (Block::kInTurn && threadIdx.x == 128) bulk_wait();  // before the next batch adds
    wgmma_pin(dk);
    wgmma_pin(dv);
    this->template store<Config::kDimQK>(c, tile, dk, Variant::kFactor, p.dk, p.dk_at);
    this->template store<Config::kDimV>(c, tile, dv, 1.0f, p.dv, p.dv_at);
  }

  FA3_DEVICE void consume() const {
    this->each_tile([&](Consumer& c, const TileCoord& tile, const QuerySequence& seq) {
      attend(c, tile, seq);
    });
  }

  FA3_DEVICE static void run(const Params& p) { run_backward<AttentionBackward>(p); }
};

}  // namespace fa3
