// Attention forward on Hopper, after FlashAttention-3 (Shah et al. 2024): one producer warpgroup
// loads by TMA, two or three consumer warpgroups of 64 query rows each multiply and normalise.
// A consumer issues the scores of block i + 1 before the softmax of block i is needed, so the
// tensor cores work under the exponentials; warpgroups take turns to issue (PingPong).
#pragma once
#include "fa3/barriers.cuh"
#include "fa3/block_map.cuh"
#include "fa3/mbarrier.cuh"
#include "fa3/scheduler.cuh"
#include "fa3/softmax.cuh"
#include "fa3/tma.cuh"
#include "fa3/wgmma.cuh"

namespace fa3 {

// Head dims are those of the tensors; a tile in shared memory is as wide as the next multiple of
// 32 and TMA fills the rest with zeros.
template <class DtypeT, int DimQK, int DimV, int BlockM_, int BlockN_, bool LongestFirst_,
          bool PingPong_, bool Lazy_>
struct ForwardConfig {
  using Dtype = DtypeT;
  static constexpr int kDimQK = DimQK, kDimV = DimV, kBlockM = BlockM_, kBlockN = BlockN_;
  static constexpr bool kLongestFirst = LongestFirst_, kPingPong = PingPong_, kLazy = Lazy_;
  static constexpr int kStages = 2;
  static constexpr int kWarpgroups = BlockM_ / 64;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // Of 65,536 registers consumers take what their tiles need and the producer the rest. Three
  // warpgroups hold scores, weights and output in 152 where those are small enough.
  static constexpr bool kTight = 3 * BlockN_ / 4 + DimV / 2 > 108;
  static constexpr int kProducerRegisters =
      kWarpgroups == 2 ? 40 : kWarpgroups == 3 && kTight ? 32 : 56;
  static constexpr int kConsumerRegisters =
      kWarpgroups == 2 ? 232 : kWarpgroups == 1 ? 248 : kTight ? 160 : 152;
  static_assert(DimQK % 8 == 0 && DimV % 8 == 0 && DimQK <= 256 && DimV <= 256, "head dims");
  static_assert(BlockM_ % 64 == 0 && kWarpgroups <= 3 && BlockN_ % 16 == 0, "tile");
};

template <class Aux>
struct ForwardParams {
  TensorMap q, k, v, tile;
  void* out;
  float* lse;  // (batch, heads, queries), natural log
  int64_t out_batch, out_head, out_row;  // strides in elements
  TileOrder order;
  BlockMap map;
  int group;  // query heads of a key head
  int queries, keys;
  int tile_batch, tile_head;  // 1, or 0 where the dense input broadcasts
  Aux aux;
};

// One operand tile: panels of 64 columns (128-byte swizzle), or of 32 where that wastes less.
template <int Dim, int Rows>
struct OperandTile {
  static constexpr int kWidth = round_up(Dim, 32);
  static constexpr int kSwizzle = kWidth % 64 == 0 ? 128 : 64;
  static constexpr int kPanelColumns = kSwizzle / 2;
  static constexpr int kPanels = kWidth / kPanelColumns;
  static constexpr int kPanelBytes = Rows * kSwizzle;
  static constexpr int kBytes = kPanels * kPanelBytes;
  using Desc = Descriptor<kSwizzle>;

  FA3_DEVICE static void load(uint32_t dst, const TensorMap& map, uint32_t barrier,
                              uint64_t policy, int row, int head, int batch) {
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
      tma_load(dst + i * kPanelBytes, map, barrier, policy, i * kPanelColumns, row, head, batch);
  }
};

template <class Config, class Variant>
struct AttentionForward {
  using Dtype = typename Config::Dtype;
  using Params = ForwardParams<typename Variant::Aux>;
  using At = typename Variant::At;
  static constexpr int kM = Config::kBlockM, kN = Config::kBlockN, kStages = Config::kStages;
  using QTile = OperandTile<Config::kDimQK, kM>;
  using KTile = OperandTile<Config::kDimQK, kN>;
  using VTile = OperandTile<Config::kDimV, kN>;
  using Turns = PingPong<Config::kWarpgroups, Config::kPingPong>;
  using Pipe = PipelineState<kStages>;
  using Weights = Softmax<kN, Config::kLazy>;

  // Whether warpgroups of a tile may see different key blocks.
  static constexpr bool kSplit =
      Config::kWarpgroups > 1 && (Variant::kRowEnd || Variant::kRowBegin) && !Variant::kBlockMap;

  // The dense (q, kv) input of a 16-bit type: panels of 64 key columns.
  static constexpr int kDensePanelBytes = kM * 128;
  static constexpr int kDenseBytes = Variant::kDenseTile ? kN / 64 * kDensePanelBytes : 0;
  static_assert(!Variant::kDenseTile || kN % 64 == 0, "a dense tile is whole panels wide");

  // A second query stage, where it fits, lets the next tile's queries load ahead.
  static constexpr int kSharedLimit = 232448;
  static constexpr int kOperandBytes = kStages * (KTile::kBytes + VTile::kBytes + kDenseBytes);
  static constexpr int kQStages =
      2 * QTile::kBytes + kOperandBytes + 2048 <= kSharedLimit ? 2 : 1;

  // Shared memory, in bytes from a base aligned to 1024.
  static constexpr int kAtQ = 0;
  static constexpr int kAtK = kAtQ + kQStages * QTile::kBytes;
  static constexpr int kAtV = kAtK + kStages * KTile::kBytes;
  static constexpr int kAtDense = kAtV + kStages * VTile::kBytes;
  static constexpr int kAtBarriers = kAtDense + kStages * kDenseBytes;
  enum Barrier {
    kQFull, kQEmpty = kQFull + kQStages,
    kKFull = kQEmpty + kQStages, kKEmpty = kKFull + kStages,
    kVFull = kKEmpty + kStages, kVEmpty = kVFull + kStages,
    kDenseFull = kVEmpty + kStages, kDenseEmpty = kDenseFull + kStages,
    kTileFull = kDenseEmpty + kStages, kTileEmpty = kTileFull + 2,
    kBarriers = kTileEmpty + 2
  };
  static constexpr int kAtTiles = round_up(kAtBarriers + 8 * kBarriers, 16);
  static constexpr int kSharedBytes = kAtTiles + 32 + 1024;  // and room to align the base
  static_assert(kSharedBytes <= kSharedLimit, "the tile needs more shared memory than there is");

  const Params& p;
  uint32_t shared;

  FA3_DEVICE uint32_t barrier(int which) const { return shared + kAtBarriers + 8 * which; }

  FA3_DEVICE At site(const TileCoord& tile) const {
    return {p.aux, tile.batch, tile.head, p.queries, p.keys};
  }

  FA3_DEVICE BlockSequence sequence(const TileCoord& tile) const {
    return block_sequence<Variant, kM, kN>(site(tile), p.map, tile.query_block);
  }

  FA3_DEVICE void init_barriers() const {
    constexpr int consumer_warps = 4 * Config::kWarpgroups;
    for (int i = 0; i < kBarriers; ++i) {
      bool empty = (i >= kQEmpty && i < kKFull) || (i >= kKEmpty && i < kVFull) ||
                   (i >= kVEmpty && i < kDenseFull) || (i >= kDenseEmpty && i < kTileFull) ||
                   i >= kTileEmpty;
      mbarrier_init(barrier(i), empty ? consumer_warps : 1);
    }
    mbarrier_init_fence();
  }

  // ---- producer: one thread ----

  FA3_DEVICE void load_k(Pipe at, const TileCoord& tile, int kv_head, int block) const {
    mbarrier_wait(barrier(kKEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = barrier(kKFull + at.stage());
    mbarrier_expect(full, KTile::kBytes);
    KTile::load(shared + kAtK + at.stage() * KTile::kBytes, p.k, full, kEvictLast, block * kN,
                kv_head, tile.batch);
    if constexpr (Variant::kDenseTile) {
      mbarrier_wait(barrier(kDenseEmpty + at.stage()), at.parity() ^ 1);
      full = barrier(kDenseFull + at.stage());
      mbarrier_expect(full, kDenseBytes);
      uint32_t dst = shared + kAtDense + at.stage() * kDenseBytes;
#pragma unroll
      for (int i = 0; i < kN / 64; ++i)
        tma_load(dst + i * kDensePanelBytes, p.tile, full, kEvictFirst, block * kN + i * 64,
                 tile.query_block * kM, tile.head * p.tile_head, tile.batch * p.tile_batch);
    }
  }

  FA3_DEVICE void load_v(Pipe at, const TileCoord& tile, int kv_head, int block) const {
    mbarrier_wait(barrier(kVEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = barrier(kVFull + at.stage());
    mbarrier_expect(full, VTile::kBytes);
    VTile::load(shared + kAtV + at.stage() * VTile::kBytes, p.v, full, kEvictLast, block * kN,
                kv_head, tile.batch);
  }

  FA3_DEVICE void produce() const {
    Pipe k;  // values are one block behind
    PipelineState<kQStages> q;
    PipelineState<2> ring;
    tma_prefetch(p.q);
    tma_prefetch(p.k);
    tma_prefetch(p.v);
    for (TileQueue<Config::kLongestFirst> queue;; queue.next(p.order)) {
      bool more = queue.index < p.order.tiles;
      TileCoord tile{-1, 0, 0};
      if (more) tile = p.order.template coord<Config::kLongestFirst>(queue.index);
      publish(ring, tile);
      ring.advance();
      if (!more) break;
      queue.take(p.order);
      BlockSequence seq = sequence(tile);
      if (seq.count == 0) continue;
      mbarrier_wait(barrier(kQEmpty + q.stage()), q.parity() ^ 1);
      uint32_t full = barrier(kQFull + q.stage());
      mbarrier_expect(full, QTile::kBytes);
      QTile::load(shared + kAtQ + q.stage() * QTile::kBytes, p.q, full, kEvictFirst,
                  tile.query_block * kM, tile.head, tile.batch);
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

  // Tiles go to the consumers through two slots, each of four words.
  FA3_DEVICE void publish(PipelineState<2> at, const TileCoord& tile) const {
    mbarrier_wait(barrier(kTileEmpty + at.stage()), at.parity() ^ 1);
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, 0};" ::"r"(shared + kAtTiles +
                                                                 16 * at.stage()),
                 "r"(tile.query_block), "r"(tile.head), "r"(tile.batch)
                 : "memory");
    mbarrier_arrive(barrier(kTileFull + at.stage()));
  }

  FA3_DEVICE TileCoord receive(PipelineState<2> at, int lane) const {
    TileCoord tile;
    int unused;
    mbarrier_wait(barrier(kTileFull + at.stage()), at.parity());
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.query_block), "=r"(tile.head), "=r"(tile.batch), "=r"(unused)
                 : "r"(shared + kAtTiles + 16 * at.stage())
                 : "memory");
    release(kTileEmpty + at.stage(), lane);
    return tile;
  }

  // ---- consumers ----

  struct Consumer {
    int warpgroup, lane;
    PipelineState<kQStages> q;
    Pipe k, v, dense;
    float out[Config::kDimV / 2];
    uint32_t weights[kN / 4];  // P as the A operand of the values product
    Weights softmax;
  };

  struct TileTerms {
    At at;
    typename Variant::Head head;
    typename Variant::Row row[2];
    int q[2];  // past the last query: the last
    float distance[2];  // this thread's first column less the row, for affine terms
    float scale, slope;
  };

  FA3_DEVICE void release(int which, int lane) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier(which));
  }

  // S = Q K^T of one key block; left running.
  FA3_DEVICE void issue_scores(const Consumer& c, float (&s)[kN / 2]) const {
    constexpr int steps = ceil_div(Config::kDimQK, 16);
    constexpr int panel_steps = QTile::kPanelColumns / 16;
    uint32_t q = QTile::Desc::low(shared + kAtQ + c.q.stage() * QTile::kBytes +
                                      c.warpgroup * 64 * QTile::kSwizzle, 16);
    uint32_t k = KTile::Desc::low(shared + kAtK + c.k.stage() * KTile::kBytes, 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      int panel = i / panel_steps, inside = i % panel_steps * 32;
      Wgmma<Dtype, kN>::ss(s, QTile::Desc::make(q + (panel * QTile::kPanelBytes + inside) / 16),
                           KTile::Desc::make(k + (panel * KTile::kPanelBytes + inside) / 16),
                           i > 0);
    }
    wgmma_commit();
  }

  // O += P V of one key block; left running.
  FA3_DEVICE void issue_values(Consumer& c) const {
    uint32_t v =
        VTile::Desc::low(shared + kAtV + c.v.stage() * VTile::kBytes, VTile::kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) {
      const uint32_t* a = c.weights + 4 * i;
      Wgmma<Dtype, Config::kDimV>::rs(c.out, a[0], a[1], a[2], a[3],
                                      VTile::Desc::make(v + i * 16 * VTile::kSwizzle / 16));
    }
    wgmma_commit();
  }

  // Score modifier and mask of one key block, then the softmax. Returns whether O must be scaled.
  template <bool Masked>
  FA3_DEVICE bool weigh(Consumer& c, const TileTerms& t, float (&s)[kN / 2], int block,
                        float (&alpha)[2]) const {
    int kv0 = block * kN + 2 * (c.lane % 4);  // this thread's first column
    float base[2] = {0.0f, 0.0f};
    uint32_t dense = 0;
    int swizzle = c.lane / 4;  // row % 8 of both rows
    if constexpr (Variant::kDenseTile) {
      mbarrier_wait(barrier(kDenseFull + c.dense.stage()), c.dense.parity());
      int row = c.warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + c.lane / 4;
      dense = shared + kAtDense + c.dense.stage() * kDenseBytes + row * 128 + c.lane % 4 * 4;
    }
    if constexpr (Variant::kAffine) {
      float block_start = static_cast<float>(block * kN);
#pragma unroll
      for (int r = 0; r < 2; ++r) base[r] = t.slope * (block_start + t.distance[r]);
    }
    int end[2], begin[2];
    if constexpr (Masked) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        end[r] = t.at.keys - kv0;
        if constexpr (Variant::kRowEnd)
          end[r] = min(end[r], Variant::row_end(t.at, t.head, t.row[r], t.q[r]) - kv0);
        if constexpr (Variant::kRowBegin)
          begin[r] = Variant::row_begin(t.at, t.head, t.row[r], t.q[r]) - kv0;
      }
    }
    uint32_t columns[ceil_div(kN, 32)];  // a bit for each of the block's keys
    if constexpr (Masked && Variant::kColumnMask) {
#pragma unroll
      for (int i = 0; i < ceil_div(kN, 32); ++i) {
        int kv = min(block * kN + 32 * i + c.lane, t.at.keys - 1);
        bool seen = Variant::column_mask(t.at, t.head, Variant::col(t.at, t.head, kv), kv);
        columns[i] = __ballot_sync(~0u, seen) >> 2 * (c.lane % 4);
      }
    }
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      float2 tile[2];
      if constexpr (Variant::kDenseTile) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t bits;
          asm volatile("ld.shared.b32 %0, [%1];"
                       : "=r"(bits)
                       : "r"(dense + j / 8 * kDensePanelBytes + r * 1024 +
                             ((j % 8 ^ swizzle) << 4)));
          tile[r] = unpack<typename Variant::TileDtype>(bits);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int column = 8 * j + e, kv = kv0 + column;
        if constexpr (Masked) kv = min(kv, t.at.keys - 1);
        typename Variant::Col col = Variant::col(t.at, t.head, kv);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& x = s[4 * j + 2 * r + e];
          float extra = Variant::kDenseTile ? (e == 0 ? tile[r].x : tile[r].y) : 0.0f;
          if constexpr (Variant::kAffine) x = fmaf(t.slope, static_cast<float>(column), x);
          if constexpr (Variant::kScore)
            x = Variant::score(x, t.at, t.head, t.row[r], col, t.q[r], kv, extra);
          if constexpr (Masked) {
            bool seen = column < end[r];
            if constexpr (Variant::kRowBegin) seen = seen && column >= begin[r];
            if constexpr (Variant::kColumnMask)
              seen = seen && (columns[j / 4] & 1u << (8 * (j % 4) + e));
            if constexpr (Variant::kMask)
              seen = seen && Variant::mask(t.at, t.head, t.row[r], col, t.q[r], kv, extra);
            if (!seen) x = -inf();
          }
        }
      }
    }
    if constexpr (Variant::kDenseTile) {
      release(kDenseEmpty + c.dense.stage(), c.lane);
      c.dense.advance();
    }
    constexpr bool guard = Masked || !Variant::kFiniteScores;
    return c.softmax.template update<guard, Variant::kWideScores>(s, base, t.scale, alpha);
  }

  FA3_DEVICE static void pack_weights(Consumer& c, const float (&s)[kN / 2]) {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) c.weights[i] = pack<Dtype>(s[2 * i], s[2 * i + 1]);
  }

  FA3_DEVICE void wait_k(const Consumer& c) const {
    mbarrier_wait(barrier(kKFull + c.k.stage()), c.k.parity());
  }

  FA3_DEVICE void wait_v(const Consumer& c) const {
    mbarrier_wait(barrier(kVFull + c.v.stage()), c.v.parity());
  }

  // The scores have left shared memory; with the last block of a tile its queries have too.
  FA3_DEVICE void release_k(Consumer& c, bool last) const {
    release(kKEmpty + c.k.stage(), c.lane);
    c.k.advance();
    if (last) {
      release(kQEmpty + c.q.stage(), c.lane);
      c.q.advance();
    }
  }

  FA3_DEVICE void release_v(Consumer& c) const {
    release(kVEmpty + c.v.stage(), c.lane);
    c.v.advance();
  }

  // Scores of this block and values of the one before run while the weights are computed.
  template <bool Masked>
  FA3_DEVICE void step(Consumer& c, const TileTerms& t, int block, bool last) const {
    float s[kN / 2];
    float alpha[2];
    wait_k(c);
    Turns::wait(c.warpgroup);
    issue_scores(c, s);
    wait_v(c);
    issue_values(c);
    Turns::pass(c.warpgroup);
    wgmma_wait<1>();
    wgmma_pin(s);
    release_k(c, last);
    bool rescale = weigh<Masked>(c, t, s, block, alpha);
    wgmma_wait<0>();
    wgmma_pin(c.out);
    release_v(c);
    pack_weights(c, s);
    if (rescale) {
#pragma unroll
      for (int i = 0; i < Config::kDimV / 2; ++i) c.out[i] *= alpha[i / 2 % 2];
    }
  }

  // First block of a tile. The last values of the tile `previous`, if any, are still to be added:
  // they go first, and that tile is stored while the scores of this one run.
  FA3_DEVICE void begin(Consumer& c, const TileTerms& t, const TileCoord& previous, int block,
                        bool last) const {
    float s[kN / 2];
    float alpha[2];
    wait_k(c);
    if (previous.query_block >= 0) {
      wait_v(c);
      Turns::wait(c.warpgroup);
      issue_values(c);
      issue_scores(c, s);
      Turns::pass(c.warpgroup);
      wgmma_wait<1>();
      wgmma_pin(c.out);
      release_v(c);
      store(c, previous);
    } else {
      Turns::wait(c.warpgroup);
      issue_scores(c, s);
      Turns::pass(c.warpgroup);
    }
    wgmma_wait<0>();
    wgmma_pin(s);
    release_k(c, last);
    clear(c);
    weigh<true>(c, t, s, block, alpha);
    pack_weights(c, s);
  }

  // Blocks first .. last - 1 of the tile, which no row of this warpgroup sees: it only keeps pace,
  // values, where wanted, one block behind keys; those of the last are left to the caller.
  FA3_DEVICE void skip(Consumer& c, int first, int last, int count, bool values) const {
    for (int i = first; i < last; ++i) {
      wait_k(c);
      Turns::wait(c.warpgroup);
      Turns::pass(c.warpgroup);
      release_k(c, i + 1 == count);
      if constexpr (Variant::kDenseTile) {
        mbarrier_wait(barrier(kDenseFull + c.dense.stage()), c.dense.parity());
        release(kDenseEmpty + c.dense.stage(), c.lane);
        c.dense.advance();
      }
      if (values && i > first) skip_values(c, 1);
    }
  }

  FA3_DEVICE void skip_values(Consumer& c, int count) const {
    for (int i = 0; i < count; ++i) {
      wait_v(c);
      release_v(c);
    }
  }

  // The tile's blocks as this warpgroup's 64 rows see them: those that none of them sees are
  // skipped at either end. Blocks listed at run time are the tile's.
  FA3_DEVICE BlockSequence own_sequence(const Consumer& c, const TileCoord& tile,
                                        const BlockSequence& seq) const {
    if constexpr (!kSplit) {
      return seq;
    } else {
      int rows = tile.query_block * Config::kWarpgroups + c.warpgroup;
      if (rows * 64 >= p.queries) return {};
      int limit = seq.first + 1;
      return block_sequence<Variant, 64, kN>(site(tile), p.map, rows, limit - seq.count, limit);
    }
  }

  // All of a tile but its last values, which wait for the next tile or for finish(). `previous` is
  // the tile whose last values wait, and becomes this one.
  FA3_DEVICE void attend(Consumer& c, const TileCoord& tile, const BlockSequence& seq,
                         TileCoord& previous) const {
    BlockSequence own = own_sequence(c, tile, seq);
    TileTerms t = terms(c, tile);
    mbarrier_wait(barrier(kQFull + c.q.stage()), c.q.parity());
    int before = 0;
    if constexpr (kSplit) {
      before = own.count > 0 ? seq.first - own.first : seq.count;
      // Values of the previous tile may hold a stage only while the producer can go on without.
      if (previous.query_block >= 0 && before > kStages) {
        finish(c, previous);
        previous.query_block = -1;
      }
      bool held = previous.query_block >= 0;
      skip(c, 0, before, seq.count, !held);
      if (!held && before > 0 && own.count > 0) before = 1;
      if (own.count == 0) {
        if (held) finish(c, previous);
        skip_values(c, held ? before : 1);
        previous.query_block = -1;
        clear(c);
        return store(c, tile);
      }
    }
    int i = seq.first - own.first;  // 0 where blocks are listed
    begin(c, t, previous, own.block(0), i + 1 == seq.count);
    skip_values(c, before);
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
      step<true>(c, t, block, last);
    }
    if (!Variant::kLeftBlocks) full_end = own_end;
    while (i < full_end) {
      bool last = advance();
      step<false>(c, t, block, last);
    }
    if constexpr (Variant::kLeftBlocks) {
      while (i < own_end) {
        bool last = advance();
        step<true>(c, t, block, last);
      }
    }
    previous = tile;
    if constexpr (kSplit) {
      if (own_end < seq.count) {
        finish(c, tile);
        skip(c, own_end, seq.count, seq.count, true);
        skip_values(c, 1);
        previous.query_block = -1;
      }
    }
  }

  FA3_DEVICE void finish(Consumer& c, const TileCoord& tile) const {
    wait_v(c);
    issue_values(c);
    wgmma_wait<0>();
    wgmma_pin(c.out);
    release_v(c);
    store(c, tile);
  }

  FA3_DEVICE static void clear(Consumer& c) {
    c.softmax = Weights();
#pragma unroll
    for (int i = 0; i < Config::kDimV / 2; ++i) c.out[i] = 0.0f;
  }

  // O and LSE of the two rows of each thread. Lanes of a quad exchange pieces so that each writes
  // 16 bytes: no shared memory, and the next tile loads meanwhile.
  FA3_DEVICE void store(Consumer& c, const TileCoord& tile) const {
    TileTerms t = terms(c, tile);
    constexpr int pieces = Config::kDimV / 8;
    int quad_lane = c.lane % 4;
    int rows = first_row(c, tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = quad_sum(c.softmax.sum[r]);
      float top = c.softmax.max[r] * t.scale;
      float factor = 1.0f;
      bool dead = sum == 0.0f;
      float lse = Variant::kWideScores ? c.softmax.max[r] : top * kLn2;
      if constexpr (Variant::kSink) {
        float sink = Variant::sink(t.at, t.head, t.row[r], t.q[r]);
        if constexpr (Variant::kShift) sink -= Variant::shift(t.at, t.head, t.row[r], t.q[r]);
        sink *= kLog2e;
        float raised = fmaxf(top, sink);
        bool nothing = raised == -inf();
        factor = nothing ? 1.0f : exp2_approx(top - raised);
        sum = sum * factor + (nothing ? 0.0f : exp2_approx(sink - raised));
        lse = raised * kLn2;
        if constexpr (Variant::kDead != Dead::kFilled) dead = sum == 0.0f;
      }
      lse += log2_approx(sum) * kLn2;
      if constexpr (Variant::kShift) lse += Variant::shift(t.at, t.head, t.row[r], t.q[r]);
      factor = dead ? (Variant::kDead == Dead::kZero ? 0.0f : nan()) : __fdividef(factor, sum);
      int row = rows + 8 * r;
      bool inside = row < t.at.queries;
      if (inside && quad_lane == 0) {
        int64_t at = static_cast<int64_t>(t.at.batch) * p.order.heads + t.at.head;
        p.lse[at * t.at.queries + row] = dead ? -inf() : lse;
      }
      char* out = static_cast<char*>(p.out) +
                  2 * (t.at.batch * p.out_batch + t.at.head * p.out_head +
                       static_cast<int64_t>(row) * p.out_row);
#pragma unroll
      for (int j = 0; j < pieces; j += 4) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int at = j + i < pieces ? 4 * (j + i) + 2 * r : 0;
          x[i] = pack<Dtype>(c.out[at] * factor, c.out[at + 1] * factor);
        }
        quad_transpose(x, quad_lane);
        store_if(inside && j + quad_lane < pieces, out + 16 * (j + quad_lane), x);
      }
    }
  }

  FA3_DEVICE static void store_if(bool wanted, char* to, const uint32_t (&x)[4]) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5};}" ::"r"(
            static_cast<int>(wanted)),
        "l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
        : "memory");
  }

  // x[i] of lane l becomes x[l] of lane i, within each four lanes.
  FA3_DEVICE static void quad_transpose(uint32_t (&x)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      bool upper = lane & bit;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        uint32_t sent = upper ? x[i] : x[i | bit];
        uint32_t received = __shfl_xor_sync(~0u, sent, bit);
        if (upper) x[i] = received;
        else x[i | bit] = received;
      }
    }
  }

  FA3_DEVICE TileTerms terms(const Consumer& c, const TileCoord& tile) const {
    TileTerms t{site(tile)};
    t.head = Variant::head(t.at);
    t.scale = Variant::scale(t.head);
    t.slope = Variant::slope(t.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      t.q[r] = min(first_row(c, tile) + 8 * r, p.queries - 1);
      t.distance[r] = static_cast<float>(2 * (c.lane % 4) - t.q[r]);
      t.row[r] = Variant::row(t.at, t.head, t.q[r]);
    }
    return t;
  }

  // The first of this thread's two rows, eight apart.
  FA3_DEVICE static int first_row(const Consumer& c, const TileCoord& tile) {
    return tile.query_block * kM + c.warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + c.lane / 4;
  }

  FA3_DEVICE void consume() const {
    Consumer c;
    c.warpgroup = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
    c.lane = threadIdx.x % 32;
    PipelineState<2> ring;
    TileCoord previous{-1, 0, 0};
    Turns::start(c.warpgroup);
    for (;; ring.advance()) {
      TileCoord tile = receive(ring, c.lane);
      if (tile.query_block < 0) break;
      BlockSequence seq = sequence(tile);
      if (seq.count > 0) {
        attend(c, tile, seq, previous);
      } else {
        if (previous.query_block >= 0) finish(c, previous);
        previous.query_block = -1;
        clear(c);
        store(c, tile);
      }
    }
    if (previous.query_block >= 0) finish(c, previous);
  }

  FA3_DEVICE static void run(const Params& p) {
    extern __shared__ char memory[];
    AttentionForward self{p, (shared_address(memory) + 1023) & ~1023u};
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
