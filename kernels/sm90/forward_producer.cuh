// The producer of the forward kernel: one thread takes tiles, tells the consumers which, and loads
// queries, keys, values and dense inputs by TMA.
#pragma once
#include "sm90/forward_block.cuh"

namespace fa3 {

template <class Config, class Variant>
struct ForwardProducer : ForwardBlock<Config, Variant> {
  using Base = ForwardBlock<Config, Variant>;
  using typename Base::KTile, typename Base::Pipe, typename Base::QTile, typename Base::VTile;
  using Base::kM, Base::kN, Base::kQStages, Base::p, Base::shared;

  FA3_DEVICE void load_q(PipelineState<kQStages> at, const TileCoord& tile) const {
    mbarrier_wait(this->barrier(Base::kQEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = this->barrier(Base::kQFull + at.stage());
    int bytes = QTile::kBytes;
    if (Config::kPacked) bytes = p.packing.heads * p.packing.rows * QTile::kWidth * 2;
    mbarrier_expect(full, bytes);
    QTile::load(shared + Base::kAtQ + at.stage() * QTile::kBytes, p.q, full, kEvictFirst,
                tile.query_block * this->tile_rows(), tile.head, tile.batch);
  }

  FA3_DEVICE void load_k(Pipe at, const TileCoord& tile, int kv_head, int block) const {
    mbarrier_wait(this->barrier(Base::kKEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = this->barrier(Base::kKFull + at.stage());
    constexpr bool dense = Config::kDenseFirst && Variant::kDenseTile;
    mbarrier_expect(full, KTile::kBytes + (dense ? Base::kDenseBytes : 0));
    if constexpr (dense) copy_dense(at, tile, block, full);
    KTile::load(shared + Base::kAtK + at.stage() * KTile::kBytes, p.k, full, kEvictLast,
                block * kN, kv_head, tile.batch);
    if constexpr (Variant::kDenseTile && !dense) load_dense(at, tile, block);
  }

  FA3_DEVICE void load_dense(Pipe at, const TileCoord& tile, int block) const {
    mbarrier_wait(this->barrier(Base::kDenseEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = this->barrier(Base::kDenseFull + at.stage());
    mbarrier_expect(full, Base::kDenseBytes);
    copy_dense(at, tile, block, full);
  }

  FA3_DEVICE void copy_dense(Pipe at, const TileCoord& tile, int block, uint32_t full) const {
    Base::Dense::load(shared + Base::kAtDense + at.stage() * Base::kDenseBytes, p.tile, full,
                      block * kN, tile.query_block * kM, tile.head * p.tile_head,
                      tile.batch * p.tile_batch);
  }

  FA3_DEVICE void load_v(Pipe at, const TileCoord& tile, int kv_head, int block) const {
    mbarrier_wait(this->barrier(Base::kVEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = this->barrier(Base::kVFull + at.stage());
    mbarrier_expect(full, VTile::kBytes);
    VTile::load(shared + Base::kAtV + at.stage() * VTile::kBytes, p.v, full, kEvictLast,
                block * kN, kv_head, tile.batch);
  }

  static constexpr bool kListed = Config::kLongestFirst && Variant::kBlockMap &&
                                  !Variant::kRowEnd && !Variant::kRowBegin;

  // The order counts runs of packed heads; here they become the first head of each.
  FA3_DEVICE TileCoord tile(uint32_t index) const {
    if constexpr (Variant::kDenseTile && !Config::kSplitKV) {
      if (p.turn > 0) return in_turn(p.order.template coord<true>(index));
    }
    if constexpr (kListed) {
      // Listed masks have no trend: query blocks of a head follow each other, but in the last section,
      // where long tiles that begin late would keep the others waiting.
      int heads = p.order.tiles / p.order.query_blocks;
      int last = (heads - 1) / p.order.section * p.order.section;
      if (index < last * p.order.query_blocks) return p.order.template coord<false>(index);
    }
    TileCoord tile = p.order.template coord<Config::kLongestFirst, Config::kSplitKV>(index);
    if constexpr (Config::kPacked) {
      int kv_head = tile.head / p.packing.chunks;
      int chunk = tile.head - kv_head * p.packing.chunks;
      tile.head = kv_head * p.group + chunk * p.packing.heads;
    }
    return tile;
  }

  // The same tiles, the batches of a head next to each other rather than the heads of a batch.
  FA3_DEVICE TileCoord in_turn(TileCoord tile) const {
    int head = tile.batch * p.order.heads + tile.head;
    tile.head = head / p.turn;
    tile.batch = head - tile.head * p.turn;
    return tile;
  }

  FA3_DEVICE void run() const {
    Pipe k;  // values are one block behind
    PipelineState<kQStages> q;
    TileRing ring = this->ring();
    tma_prefetch(p.q);
    tma_prefetch(p.k);
    tma_prefetch(p.v);
    for (TileQueue<Config::kLongestFirst> queue;; queue.next(p.order)) {
      bool more = queue.index < p.order.tiles;
      TileCoord tile = kNoTile;
      if (more) tile = this->tile(queue.index);
      ring.publish(tile);
      if (!more) break;
      queue.take(p.order);
      BlockSequence seq = this->sequence(tile);
      if (seq.count == 0) continue;
      load_q(q, tile);
      q.advance();
      int kv_head = tile.head / p.group;
      int block = seq.block(0);
      load_k(k, tile, kv_head, block);
      k.advance();
#pragma unroll 1
      for (int i = 1; i < seq.count; ++i) {
        int next = seq.block(i);
        load_k(k, tile, kv_head, next);
        load_v({k.passed - 1}, tile, kv_head, block);
        k.advance();
        block = next;
      }
      load_v({k.passed - 1}, tile, kv_head, block);
    }
  }
};

}  // namespace fa3
