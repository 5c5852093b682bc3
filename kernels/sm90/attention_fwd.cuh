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
          bool PingPong_, bool Lazy_, int PolyStride_>
struct ForwardConfig {
  using Dtype = DtypeT;
  static constexpr int kDimQK = DimQK, kDimV = DimV, kBlockM = BlockM_, kBlockN = BlockN_;
  static constexpr bool kLongestFirst = LongestFirst_, kPingPong = PingPong_, kLazy = Lazy_;
  static constexpr int kPolyStride = PolyStride_;
  static constexpr int kStages = 2;
  static constexpr int kWarpgroups = BlockM_ / 64;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // Of 65,536 registers consumers take what their tiles need and the producer the rest.
  static constexpr int kProducerRegisters =
      kWarpgroups == 3 ? 32 : kWarpgroups == 2 ? 40 : 56;
  static constexpr int kConsumerRegisters =
      kWarpgroups == 3 ? 160 : kWarpgroups == 2 ? 232 : 248;
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
  using Weights = Softmax<kN, Config::kLazy, Config::kPolyStride>;

  // The dense (q, kv) input of a 16-bit type: panels of 64 key columns.
  static constexpr int kDensePanelBytes = kM * 128;
  static constexpr int kDenseBytes = Variant::kDenseTile ? kN / 64 * kDensePanelBytes : 0;
  static_assert(!Variant::kDenseTile || kN % 64 == 0, "a dense tile is whole panels wide");

  // Shared memory, in bytes from a base aligned to 1024.
  static constexpr int kAtQ = 0;
  static constexpr int kAtK = kAtQ + QTile::kBytes;
  static constexpr int kAtV = kAtK + kStages * KTile::kBytes;
  static constexpr int kAtDense = kAtV + kStages * VTile::kBytes;
  static constexpr int kAtBarriers = kAtDense + kStages * kDenseBytes;
  enum Barrier {
    kQFull, kQEmpty,
    kKFull, kKEmpty = kKFull + kStages,
    kVFull = kKEmpty + kStages, kVEmpty = kVFull + kStages,
    kDenseFull = kVEmpty + kStages, kDenseEmpty = kDenseFull + kStages,
    kTileFull = kDenseEmpty + kStages, kTileEmpty = kTileFull + 2,
    kBarriers = kTileEmpty + 2
  };
  static constexpr int kAtTiles = kAtBarriers + 8 * kBarriers;
  static constexpr int kSharedBytes = kAtTiles + 16 + 1024;  // and room to align the base

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
      bool empty = i == kQEmpty || (i >= kKEmpty && i < kVFull) ||
                   (i >= kVEmpty && i < kDenseFull) || (i >= kDenseEmpty && i < kTileFull) ||
                   i >= kTileEmpty;
      mbarrier_init(barrier(i), empty ? consumer_warps : 1);
    }
    mbarrier_init_fence();
  }

  // ---- producer: one thread ----

  FA3_DEVICE void load_k(Pipe at, const TileCoord& tile, int block) const {
    mbarrier_wait(barrier(kKEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = barrier(kKFull + at.stage());
    mbarrier_expect(full, KTile::kBytes);
    KTile::load(shared + kAtK + at.stage() * KTile::kBytes, p.k, full, kEvictLast, block * kN,
                tile.head / p.group, tile.batch);
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

  FA3_DEVICE void load_v(Pipe at, const TileCoord& tile, int block) const {
    mbarrier_wait(barrier(kVEmpty + at.stage()), at.parity() ^ 1);
    uint32_t full = barrier(kVFull + at.stage());
    mbarrier_expect(full, VTile::kBytes);
    VTile::load(shared + kAtV + at.stage() * VTile::kBytes, p.v, full, kEvictLast, block * kN,
                tile.head / p.group, tile.batch);
  }

  FA3_DEVICE void produce() const {
    Pipe k;  // values are one block behind
    PipelineState<1> q;
    PipelineState<2> ring;
    tma_prefetch(p.q);
    tma_prefetch(p.k);
    tma_prefetch(p.v);
    for (int index = blockIdx.x;;) {
      bool last = index >= p.order.tiles;
      if constexpr (Config::kLongestFirst) {
        mbarrier_wait(barrier(kTileEmpty + ring.stage()), ring.parity() ^ 1);
        asm volatile("st.shared.s32 [%0], %1;" ::"r"(shared + kAtTiles + 4 * ring.stage()),
                     "r"(index) : "memory");
        mbarrier_arrive(barrier(kTileFull + ring.stage()));
        ring.advance();
      }
      if (last) break;
      TileCoord tile = p.order.template coord<Config::kLongestFirst>(index);
      // Taken now, so that the counter's latency hides behind this tile.
      index = Config::kLongestFirst ? p.order.take() : index + gridDim.x;
      BlockSequence seq = sequence(tile);
      if (seq.count == 0) continue;
      mbarrier_wait(barrier(kQEmpty), q.parity() ^ 1);
      mbarrier_expect(barrier(kQFull), QTile::kBytes);
      QTile::load(shared + kAtQ, p.q, barrier(kQFull), kEvictFirst, tile.query_block * kM,
                  tile.head, tile.batch);
      q.advance();
      int block = seq.block(0);
      load_k(k, tile, block);
      k.advance();
#pragma unroll 1
      for (int i = 1; i < seq.count; ++i) {
        int next = seq.block(i);
        load_k(k, tile, next);
        load_v({k.passed - 1}, tile, block);
        k.advance();
        block = next;
      }
      load_v({k.passed - 1}, tile, block);
    }
  }

  // ---- consumers ----

  struct Consumer {
    int warpgroup, lane;
    Pipe k, v, dense;
    float out[Config::kDimV / 2];
    uint32_t weights[kN / 4];  // P as the A operand of the values product
    Weights softmax;
  };

  struct TileTerms {
    At at;
    typename Variant::Head head;
    typename Variant::Row row[2];
    int q[2];
    float scale, slope;
  };

  FA3_DEVICE void release(int which, int lane) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier(which));
  }

  // S = Q K^T of one key block; left running.
  FA3_DEVICE void issue_scores(const Consumer& c, float (&s)[kN / 2], uint32_t stage) const {
    constexpr int steps = ceil_div(Config::kDimQK, 16);
    constexpr int panel_steps = QTile::kPanelColumns / 16;
    uint32_t q = QTile::Desc::low(shared + kAtQ + c.warpgroup * 64 * QTile::kSwizzle, 16);
    uint32_t k = KTile::Desc::low(shared + kAtK + stage * KTile::kBytes, 16);
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
  FA3_DEVICE void issue_values(Consumer& c, uint32_t stage) const {
    uint32_t v =
        VTile::Desc::low(shared + kAtV + stage * VTile::kBytes, VTile::kPanelBytes);
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
#pragma unroll
      for (int r = 0; r < 2; ++r) base[r] = t.slope * static_cast<float>(kv0 - t.q[r]);
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
        typename Variant::Col col =
            Variant::col(t.at, t.head, Masked ? min(kv, t.at.keys - 1) : kv);
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
    return c.softmax.template update<guard>(s, base, t.scale, alpha);
  }

  FA3_DEVICE static void pack_weights(Consumer& c, const float (&s)[kN / 2]) {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) c.weights[i] = pack<Dtype>(s[2 * i], s[2 * i + 1]);
  }

  // Scores of this block and values of the one before run while the weights are computed.
  template <bool Masked>
  FA3_DEVICE void step(Consumer& c, const TileTerms& t, int block) const {
    float s[kN / 2];
    float alpha[2];
    mbarrier_wait(barrier(kKFull + c.k.stage()), c.k.parity());
    Turns::wait(c.warpgroup);
    issue_scores(c, s, c.k.stage());
    mbarrier_wait(barrier(kVFull + c.v.stage()), c.v.parity());
    issue_values(c, c.v.stage());
    Turns::pass(c.warpgroup);
    wgmma_wait<1>();
    wgmma_pin(s);
    release(kKEmpty + c.k.stage(), c.lane);
    c.k.advance();
    bool rescale = weigh<Masked>(c, t, s, block, alpha);
    wgmma_wait<0>();
    wgmma_pin(c.out);
    release(kVEmpty + c.v.stage(), c.lane);
    c.v.advance();
    pack_weights(c, s);
    if (rescale) {
#pragma unroll
      for (int i = 0; i < Config::kDimV / 2; ++i) c.out[i] *= alpha[i / 2 % 2];
    }
  }

  FA3_DEVICE void attend(Consumer& c, const TileTerms& t, const BlockSequence& seq) const {
    c.softmax = Weights();
#pragma unroll
    for (int i = 0; i < Config::kDimV / 2; ++i) c.out[i] = 0.0f;
    int block = seq.block(0);
    int next = seq.count > 1 ? seq.block(1) : 0;  // listed blocks are read one step ahead
    {
      float s[kN / 2];
      float alpha[2];
      mbarrier_wait(barrier(kKFull + c.k.stage()), c.k.parity());
      issue_scores(c, s, c.k.stage());
      wgmma_wait<0>();
      wgmma_pin(s);
      release(kKEmpty + c.k.stage(), c.lane);
      c.k.advance();
      weigh<true>(c, t, s, block, alpha);
      pack_weights(c, s);
    }
    int i = 1;
    auto advance = [&] {
      block = next;
      if (++i < seq.count) next = seq.block(i);
    };
    while (i < seq.masked) advance(), step<true>(c, t, block);
    int full_end = Variant::kLeftBlocks ? seq.masked + seq.full : seq.count;
    while (i < full_end) advance(), step<false>(c, t, block);
    if constexpr (Variant::kLeftBlocks)
      while (i < seq.count) advance(), step<true>(c, t, block);
    release(kQEmpty, c.lane);
    mbarrier_wait(barrier(kVFull + c.v.stage()), c.v.parity());
    issue_values(c, c.v.stage());
    wgmma_wait<0>();
    wgmma_pin(c.out);
    release(kVEmpty + c.v.stage(), c.lane);
    c.v.advance();
  }

  // O and LSE of the two rows of each thread. Lanes of a quad exchange pieces so that each writes
  // 16 bytes: no shared memory, and the next tile loads meanwhile.
  FA3_DEVICE void store(Consumer& c, const TileTerms& t) const {
    constexpr int pieces = Config::kDimV / 8;
    int quad_lane = c.lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = quad_sum(c.softmax.sum[r]);
      float top = c.softmax.max[r] * t.scale;
      float factor = 1.0f;
      if constexpr (Variant::kSink) {
        float sink = Variant::sink(t.at, t.head);
        float raised = fmaxf(top, sink);
        factor = exp2_approx(top - raised);
        sum = sum * factor + exp2_approx(sink - raised);
        top = raised;
      }
      factor = sum == 0.0f ? 0.0f : __fdividef(factor, sum);
      bool inside = t.q[r] < t.at.queries;
      int64_t row = t.q[r];
      if (inside && quad_lane == 0) {
        int64_t at = (static_cast<int64_t>(t.at.batch) * p.order.heads + t.at.head);
        p.lse[at * t.at.queries + row] =
            sum == 0.0f ? -inf() : (top + log2_approx(sum)) * kLn2;
      }
      char* out = static_cast<char*>(p.out) +
                  2 * (t.at.batch * p.out_batch + t.at.head * p.out_head + row * p.out_row);
#pragma unroll
      for (int j = 0; j < pieces; j += 4) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int at = j + i < pieces ? 4 * (j + i) + 2 * r : 0;
          x[i] = pack<Dtype>(c.out[at] * factor, c.out[at + 1] * factor);
        }
        quad_transpose(x, quad_lane);
        if (inside && j + quad_lane < pieces)
          asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(out +
                                                                        16 * (j + quad_lane)),
                       "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                       : "memory");
      }
    }
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

  FA3_DEVICE void consume() const {
    Consumer c;
    c.warpgroup = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
    c.lane = threadIdx.x % 32;
    PipelineState<1> q;
    PipelineState<2> ring;
    Turns::start(c.warpgroup);
    for (int index = blockIdx.x;;) {
      if constexpr (Config::kLongestFirst) {
        mbarrier_wait(barrier(kTileFull + ring.stage()), ring.parity());
        asm volatile("ld.shared.s32 %0, [%1];"
                     : "=r"(index) : "r"(shared + kAtTiles + 4 * ring.stage()) : "memory");
        release(kTileEmpty + ring.stage(), c.lane);
        ring.advance();
      }
      if (index >= p.order.tiles) break;
      TileCoord tile = p.order.template coord<Config::kLongestFirst>(index);
      BlockSequence seq = sequence(tile);
      TileTerms t{site(tile)};
      t.head = Variant::head(t.at);
      t.scale = Variant::scale(t.head);
      t.slope = Variant::slope(t.head);
      int q0 = tile.query_block * kM + c.warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + c.lane / 4;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        t.q[r] = q0 + 8 * r;
        t.row[r] = Variant::row(t.at, t.head, min(t.q[r], p.queries - 1));
      }
      if (seq.count > 0) {
        mbarrier_wait(barrier(kQFull), q.parity());
        q.advance();
        attend(c, t, seq);
      } else {
        c.softmax = Weights();
#pragma unroll
        for (int i = 0; i < Config::kDimV / 2; ++i) c.out[i] = 0.0f;
      }
      store(c, t);
      if (!Config::kLongestFirst) index += gridDim.x;
    }
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
