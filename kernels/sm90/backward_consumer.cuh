// What the consumers of a backward block do beside weighing: the products, dS and dQ on their way out,
// and the walk over tiles.
#pragma once
#include "sm90/backward_weigher.cuh"
#include "sm90/query_gradient.cuh"

namespace fa3 {

template <class Config, class Variant>
struct BackwardConsumer : BackwardWeigher<Config, Variant> {
  using Block = BackwardBlock<Config, Variant>;
  using typename Block::Consumer, typename Block::Dtype, typename Block::KTile,
      typename Block::OTile, typename Block::QTile, typename Block::VTile;
  using Block::kAtK, Block::kAtV, Block::kInTurn, Block::kM, Block::kN, Block::kPanelBytes,
      Block::o_tile, Block::p, Block::piece, Block::q_tile, Block::shared;

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
      if constexpr (Config::kBeside)  // the sums are gone from L2 before memory sees them
        add_global(to + j * 128, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3], kEvictLast);
      else
        add_global(to + j * 128, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
  }

  // One gradient of this thread's two keys.
  template <int Dim>
  FA3_DEVICE void store(const Consumer& c, const TileCoord& tile, const float (&x)[Dim / 2],
                        float factor, char* to, const RowStrides& at) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int kv = Block::first_key(c, tile) + 8 * r;
      store_row<Dtype, Dim, Config::kBeside>(x, r, factor, kv < p.keys,
                                             to + 2 * at.at(tile.batch, tile.head, kv));
    }
  }

  // Every tile that the producer publishes: attend(Consumer&, tile, its query blocks) where there
  // are some, which waits for K and V and lets go of them.
  template <class Attend>
  FA3_DEVICE void each_tile(Attend attend) const {
    Consumer c = Block::consumer();
    TileRing tiles = this->ring();
    HeadsBeside<Block> beside{*this, p};
    if constexpr (Config::kBeside) beside.start();
    for (;;) {
      if constexpr (Config::kFinishes) c.kv.passed = tiles.state.passed;
      TileCoord tile = tiles.receive();
      if constexpr (Config::kBeside) beside.share(tile);
      if (tile.query_block < 0) break;
      QuerySequence seq = this->sequence(tile);
      if (seq.count > 0) attend(c, tile, seq);
      else leave_out(c, tile);
      if constexpr (Config::kFinishes)
        Block::release(Block::kTileDone + (tiles.state.passed - 1) % 2, c.lane);
    }
    if (Variant::kTileGradient) bulk_wait();
    if constexpr (Config::kFinishes) pieces().from_memory();
  }

  FA3_DEVICE QueryGradientPieces<Block> pieces() const { return {*this, p}; }

  // The last warps of the first warpgroup, beside its producer.
  FA3_DEVICE void round_pieces() const {
    int rounder = static_cast<int>(threadIdx.x / 32) - 2;
    if (rounder >= 0 && rounder < Block::kRounders)
      pieces().from_shared(2);
  }

  // dK and dV of keys that no query sees.
  FA3_DEVICE void leave_out(const Consumer& c, const TileCoord& tile) const {
    if constexpr (Config::kFinishes) {
      mbarrier_wait(Block::barrier(Block::kKVFull), c.kv.parity());
      Block::release(Block::kKVEmpty, c.lane);
    }
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

// One thread block: a producer warp and the consumer warpgroups of `Kernel`, a BackwardConsumer.
template <class Kernel>
FA3_DEVICE void run_backward(const typename Kernel::Params& p) {
  extern __shared__ char memory[];
  Kernel self{{{{p, (shared_address(memory) + 1023) & ~1023u}}}};
  decltype(self.tiles_of_block()) queue{};
  if (threadIdx.x == 0) {
    queue = self.tiles_of_block();
    self.init_barriers();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    shrink_registers<Kernel::Config::kProducerRegisters>();
    if (threadIdx.x == 0) self.produce(queue);
    if constexpr (Kernel::Config::kFinishes) {
      if (threadIdx.x / 32 == 1) self.watch();
      self.round_pieces();
    }
  } else {
    grow_registers<Kernel::Config::kConsumerRegisters>();
    self.consume();
  }
}

}  // namespace fa3
