// A consumer warpgroup of the forward kernel: 64 rows of a tile. It issues the scores of block
// i + 1 before the softmax of block i is needed, so that the tensor cores work under the
// exponentials; warpgroups take turns to issue (PingPong).
#pragma once
#include "fa3/barriers.cuh"
#include "sm90/forward_epilogue.cuh"
#include "sm90/forward_weigher.cuh"

namespace fa3 {

template <class Config, class Variant>
struct ForwardConsumer : ForwardWeigher<Config, Variant> {
  using Base = ForwardBlock<Config, Variant>;
  using Weigher = ForwardWeigher<Config, Variant>;
  using typename Base::Dtype, typename Base::KTile, typename Base::Pipe, typename Base::QTile,
      typename Base::Terms, typename Base::VTile, typename Weigher::Scores;
  using Base::kM, Base::kN, Base::kQStages, Base::kStages, Base::p, Base::shared;
  using Weigher::lane, Weigher::release, Weigher::softmax, Weigher::warpgroup;
  using Turns = PingPong<Config::kWarpgroups, Config::kPingPong>;

  // Whether warpgroups of a tile may see different key blocks.
  static constexpr bool kOwnBlocks =
      Config::kWarpgroups > 1 && (Variant::kRowEnd || Variant::kRowBegin) && !Variant::kBlockMap;

  PipelineState<kQStages> q;
  Pipe k, v;
  float out[Config::kDimV / 2];
  uint32_t weights[kN / 4];  // P as the A operand of the values product
  static constexpr int kSteps = ceil_div(Config::kDimQK, 16);
  uint32_t queries[Config::kHeldQueries ? kSteps : 1][4];  // Q as that of the scores product

  FA3_DEVICE ForwardConsumer(const Base& block) : Weigher(block) {}

  // ---- barriers ----

  FA3_DEVICE void wait_q() const {
    mbarrier_wait(this->barrier(Base::kQFull + q.stage()), q.parity());
  }

  FA3_DEVICE void wait_k() const {
    mbarrier_wait(this->barrier(Base::kKFull + k.stage()), k.parity());
  }

  // The same, and scores may be issued. What they begin with is there before the warpgroup's turn; a
  // table does not wait for the keys.
  FA3_DEVICE void begin_scores(Scores& s, const Terms& t, int block) const {
    if constexpr (Variant::kByDistance) this->begin_with_table(s, t, block);
    wait_k();
    if constexpr (Config::kDenseFirst && Variant::kDenseTile) this->begin_with_dense(s, k.stage());
    wgmma_fence();
  }

  FA3_DEVICE void wait_v() const {
    mbarrier_wait(this->barrier(Base::kVFull + v.stage()), v.parity());
  }

  // The scores have left shared memory; with the last block of a tile its queries have too.
  FA3_DEVICE void release_k(bool last) {
    release(Base::kKEmpty + k.stage());
    k.advance();
    if (last) {
      release(Base::kQEmpty + q.stage());
      q.advance();
    }
  }

  FA3_DEVICE void release_v() {
    release(Base::kVEmpty + v.stage());
    v.advance();
  }

  // ---- products ----

  // The tile's queries, as the A operand of the scores product.
  FA3_DEVICE void take_queries() {
    if constexpr (Config::kHeldQueries) {
      static_assert(QTile::kSwizzle == 128, "panels of 64 columns");
      int row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + lane % 16;
      uint32_t from = shared + Base::kAtQ + q.stage() * QTile::kBytes + row * 128;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        int column = i % 4 * 2 ^ lane / 16 ^ lane % 8;  // of 16 bytes, swizzled
        load_tiles(queries[i], from + i / 4 * QTile::kPanelBytes + column * 16);
        if constexpr (Config::kDenseFirst) {
#pragma unroll
          for (uint32_t& x : queries[i]) {
            float2 q = unpack<Dtype>(x);
            x = pack<Dtype>(q.x * Variant::kFactor, q.y * Variant::kFactor);
          }
        }
      }
    }
  }

  // S = Q K^T of one key block, or S += that, behind begin_scores(); left running.
  FA3_DEVICE void issue_scores(Scores& s) const {
    constexpr bool add = Config::kDenseFirst;
    constexpr int panel_steps = QTile::kPanelColumns / 16;
    uint32_t a = QTile::Desc::low(shared + Base::kAtQ + q.stage() * QTile::kBytes +
                                      warpgroup * 64 * QTile::kSwizzle, 16);
    uint32_t b = KTile::Desc::low(shared + Base::kAtK + k.stage() * KTile::kBytes, 16);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      int panel = i / panel_steps, inside = i % panel_steps * 32;
      uint64_t keys = KTile::Desc::make(b + (panel * KTile::kPanelBytes + inside) / 16);
      if constexpr (Config::kHeldQueries) {
        const auto& x = queries[i];
        Wgmma<Dtype, kN>::held(s, x[0], x[1], x[2], x[3], keys, add || i > 0);
      } else {
        Wgmma<Dtype, kN>::ss(s, QTile::Desc::make(a + (panel * QTile::kPanelBytes + inside) / 16),
                             keys, i > 0);
      }
    }
    wgmma_commit();
  }

  // O += P V of one key block; left running.
  FA3_DEVICE void issue_values() {
    uint32_t b = VTile::Desc::low(shared + Base::kAtV + v.stage() * VTile::kBytes,
                                  VTile::kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) {
      const uint32_t* a = weights + 4 * i;
      Wgmma<Dtype, Config::kDimV>::rs(out, a[0], a[1], a[2], a[3],
                                      VTile::Desc::make(b + i * 16 * VTile::kSwizzle / 16));
    }
    wgmma_commit();
  }

  // ---- blocks of a tile ----

  // Scores of this block and values of the one before run while the other warpgroups compute
  // weights. Those of this block take the place of the weights before, whose product is waited for.
  template <bool Masked>
  FA3_DEVICE void step(const Terms& t, int block, bool last) {
    Scores s;
    float base[2];
    begin_scores(s, t, block);
    Turns::wait(warpgroup);
    issue_scores(s);
    wait_v();
    issue_values();
    Turns::pass(warpgroup);
    wgmma_wait<1>();
    wgmma_pin(s);
    release_k(last);
    constexpr bool capped = Weigher::kCapped && !Masked;
    if (!capped || !softmax.small) this->template modify<Masked>(t, s, block, base);
    bool raise = this->must_raise(t, s, base);
    constexpr bool some = Weigher::kAhead > 0 && !Masked;
    typename Weigher::Ahead ahead;
    if constexpr (some) raise = raise || !softmax.weigh_ahead(s, base, t.scale, ahead);
    wgmma_wait<0>();
    wgmma_pin(out);
    release_v();
    if constexpr (some) {
      using Dtype = typename Config::Dtype;
      if (!raise && softmax.template weigh_rest<Dtype>(s, base, t.scale, ahead, weights)) return;
      raise = true;
    }
    if constexpr (capped) {
      if (softmax.small) {
        if (!raise && this->weigh_capped(t, s, weights)) return;
        this->template modify<Masked>(t, s, block, base);
        raise = true;
      }
    }
    this->template weigh<Masked>(t, s, block, base, raise, weights, out);
  }

  // First block of a tile. The last values of the tile `previous`, if any, are still to be added:
  // they go first, under them this tile's queries may still arrive, and the previous tile is stored
  // while the scores of this one run. Blocks in closed form begin with one that may reach past the
  // keys; of listed ones the first may be full.
  FA3_DEVICE void begin(const Terms& t, const TileCoord& previous, int block, bool masked,
                        bool last) {
    Scores s;
    float base[2];
    if (previous.query_block >= 0) {
      wait_v();
      Turns::wait(warpgroup);
      issue_values();
      wait_q();
      take_queries();
      begin_scores(s, t, block);
      issue_scores(s);
      Turns::pass(warpgroup);
      wgmma_wait<1>();
      wgmma_pin(out);
      release_v();
      store(previous);
    } else {
      wait_q();
      take_queries();
      begin_scores(s, t, block);
      Turns::wait(warpgroup);
      issue_scores(s);
      Turns::pass(warpgroup);
    }
    wgmma_wait<0>();
    wgmma_pin(s);
    release_k(last);
    clear();
    if (Variant::kBlockMap && !masked) this->template modify<false>(t, s, block, base);
    else this->template modify<true>(t, s, block, base);
    this->template weigh<true>(t, s, block, base, true, weights, out);
  }

  // Blocks first .. last - 1 of the tile, which no row of this warpgroup sees: it only keeps pace,
  // values, where wanted, one block behind keys; those of the last are left to the caller.
  FA3_DEVICE void skip(int first, int last, int count, bool values) {
    for (int i = first; i < last; ++i) {
      wait_k();
      Turns::wait(warpgroup);
      Turns::pass(warpgroup);
      release_k(i + 1 == count);
      if constexpr (Weigher::kDenseLast) {
        this->wait_dense();
        this->release_dense();
      }
      if (values && i > first) skip_values(1);
    }
  }

  FA3_DEVICE void skip_values(int count) {
    for (int i = 0; i < count; ++i) {
      wait_v();
      release_v();
    }
  }

  // ---- tiles ----

  // The first of this thread's two rows in the tile, eight apart.
  FA3_DEVICE int first_row() const {
    return warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
  }

  FA3_DEVICE void store(const TileCoord& tile) const {
    ForwardEpilogue<Config, Variant>::store(p, tile, this->terms(tile, first_row(), lane), softmax,
                                            out);
  }

  FA3_DEVICE void clear() {
    softmax = typename Weigher::Weights();
#pragma unroll
    for (int i = 0; i < Config::kDimV / 2; ++i) out[i] = 0.0f;
  }

  FA3_DEVICE void finish(const TileCoord& tile) {
    wait_v();
    issue_values();
    wgmma_wait<0>();
    wgmma_pin(out);
    release_v();
    store(tile);
  }

  // The tile's blocks as this warpgroup's 64 rows see them: those that none of them sees are
  // skipped at either end. Blocks listed at run time are the tile's.
  FA3_DEVICE BlockSequence own_sequence(const TileCoord& tile, const BlockSequence& seq) const {
    if constexpr (!kOwnBlocks) {
      return seq;
    } else {
      int rows = tile.query_block * kM + warpgroup * 64;
      if (rows >= p.queries) return {};
      int limit = seq.first + 1;
      return block_sequence<Variant, kN>(this->site(tile.batch, tile.head), p.map, 0, rows,
                                         min(rows + 64, p.queries), limit - seq.count, limit);
    }
  }

  // All blocks of a tile but its last values, which wait for the next tile or for finish(): they are
  // those of `tile` then. `before` blocks are skipped already.
  FA3_DEVICE void attend(const TileCoord& tile, const BlockSequence& seq, const BlockSequence& own,
                         int before, TileCoord& previous) {
    Terms t = this->terms(tile, first_row(), lane);
    int i = seq.first - own.first;  // 0 where blocks are listed
    begin(t, previous, own.block(0), own.masked > 0, i + 1 == seq.count);
    skip_values(before);
    int own_end = i + own.count;
    int block = 0;
    int next = own.count > 1 ? own.block(1) : 0;  // listed blocks are read one step ahead
    int masked_end = i + own.masked, full_end = masked_end + own.full, first = i++;
    auto advance = [&] {
      block = next;
      if (++i < own_end) next = own.block(i - first);
      return i == seq.count;
    };
    while (i < masked_end) {
      bool last = advance();
      step<true>(t, block, last);
    }
    if (!Variant::kLeftBlocks) full_end = own_end;
    while (i < full_end) {
      bool last = advance();
      step<false>(t, block, last);
    }
    if constexpr (Variant::kLeftBlocks) {
      while (i < own_end) {
        bool last = advance();
        step<true>(t, block, last);
      }
    }
    previous = tile;
    if constexpr (kOwnBlocks) {
      if (own_end < seq.count) {
        finish(tile);
        skip(own_end, seq.count, seq.count, true);
        skip_values(1);
        previous = kNoTile;
      }
    }
  }

  FA3_DEVICE void run() {
    TileRing ring = this->ring();
    TileCoord previous = kNoTile;
    Turns::start(warpgroup);
    for (;;) {
      TileCoord tile = ring.receive();
      BlockSequence seq{}, own{};
      int before = 0;
      if (tile.query_block >= 0) {
        seq = this->sequence(tile);
        own = own_sequence(tile, seq);
        if constexpr (kOwnBlocks) before = own.count > 0 ? seq.first - own.first : seq.count;
      }
      // Values of the previous tile may hold a stage only while the producer can go on without.
      if (previous.query_block >= 0 && (own.count == 0 || before > kStages)) {
        finish(previous);
        previous = kNoTile;
      }
      if (tile.query_block < 0) break;
      bool empty = own.count == 0;
      if constexpr (kOwnBlocks) {
        bool held = previous.query_block >= 0;
        if (before > 0) {
          wait_q();  // the last block lets go of the queries, looked at or not
          skip(0, before, seq.count, !held);
          if (!held) {
            if (empty) skip_values(1);
            before = 1;
          }
        }
      }
      if (empty) {
        clear();
        store(tile);
      } else {
        attend(tile, seq, own, before, previous);
      }
    }
  }
};

}  // namespace fa3
