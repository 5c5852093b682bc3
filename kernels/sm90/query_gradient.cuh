// dQ in 16 bits from its fp32 sums, by the warps of the backward that have nothing to load, while
// the others compute, and by all of them at the end. A piece is 8 KB of the sums of a query block:
// what one or two warps add. Pieces are taken in the order of tiles, and each waits until all KV
// blocks of its head have been worked. Blocks wait only for what
// running ones have taken, or go on to take, so that it does not matter how many run at once.
#pragma once
#include "fa3/fragment.cuh"
#include "fa3/mbarrier.cuh"
#include "fa3/progress.cuh"
#include "fa3/tma.cuh"

namespace fa3 {

template <class Config>
struct QueryGradientShape {
  static constexpr int kColumns = Config::kFirstColumns;
  static constexpr int kBands = kColumns <= 64 ? 2 : 1;  // of 16 queries: those of a warp
  static constexpr int kPieces = 4 / kBands * Config::kWarpgroups;  // of a query block
  static constexpr int kBytes = kBands * 64 * kColumns;
};

template <class Block>
struct QueryGradientPieces {
  using Config = typename Block::Config;
  using Dtype = typename Config::Dtype;
  using Shape = QueryGradientShape<Config>;
  static constexpr int kBands = Shape::kBands;
  static constexpr int kEnd = Config::sum_column(Config::kWarpgroups - 1) + Config::kLastColumns;

  const Block& block;
  const typename Block::Params& p;

  // Few registers are left to a warp beside the producer: what can be computed anew is not kept.
  struct Piece {
    int position;  // of its KV head
    int index;     // among the pieces of the head

    FA3_DEVICE int row() const { return index / Shape::kPieces; }  // its query block
    FA3_DEVICE int part() const { return index / (4 / kBands) % Config::kWarpgroups; }
    FA3_DEVICE int band() const { return index % (4 / kBands) * kBands; }
  };
  FA3_DEVICE static int lane() {
    int thread = threadIdx.x;
    forget(thread);
    return thread % 32;
  }

  // A warp works pieces until there are none left.
  template <class Work>
  FA3_DEVICE void each(Work work) const {
    Piece piece{-1, 0};
    int end = 0;  // of the head's pieces
    for (;;) {
      if (lane() == 0) piece.index = atomicAdd(block.pieces_taken(), 1) - end;
      piece.index = __shfl_sync(~0u, piece.index, 0);
      if (piece.index >= 0) {
        do {
          ++piece.position;
          end += of_head();
          piece.index -= of_head();
        } while (piece.index >= 0);
        if (piece.position >= heads()) break;
        if (lane() == 0) await(block.finished(piece.position), p.order.query_blocks);
        __syncwarp();
      }
      piece.index += of_head();
      if (Config::kFirstColumns == Config::kLastColumns || piece.part() == 0)
        work.template operator()<Config::kFirstColumns>(piece);
      else
        work.template operator()<Config::kLastColumns>(piece);
      __syncwarp();
      if (lane() == 0 && reused(piece)) signal(block.rounded(piece.position));
    }
  }

  // With registers for a piece at once.
  FA3_DEVICE void from_memory() const {
    each([&]<int Columns>(const Piece& piece) {
      const float4* from = sums<Columns>(piece) + lane();
      store<Columns, 8>(piece, [&](int i) { return __ldcg(from + 32 * i); });
    });
  }

  // Through shared memory, with few: each warp has a buffer.
  FA3_DEVICE void from_shared(int first_warp) const {
    int parity = 0;
    each([&]<int Columns>(const Piece& piece) {
      constexpr int bytes = kBands * 64 * Columns;
      int own = threadIdx.x;
      forget(own);
      own = own / 32 - first_warp;
      uint32_t buffer = block.shared + Block::kAtPieces + own * Shape::kBytes;
      uint32_t full = block.barrier(Block::kPieceFull + own);
      if (lane() == 0) {
        // Sums were added to by ordinary instructions, and are read by the copy engine.
        fence_proxy_async_global();
        mbarrier_expect(full, bytes);
        bulk_load(buffer, sums<Columns>(piece), bytes, full);
      }
      mbarrier_wait(full, parity);
      parity ^= 1;
      buffer += 16 * lane();
      store<Columns, 2>(piece, [&](int i) {
        float4 x;
        load_shared(&x.x, buffer + 512 * i);
        return x;
      });
    });
  }

  FA3_DEVICE int heads() const { return p.order.heads * p.batches; }
  FA3_DEVICE int of_head() const { return Shape::kPieces * p.group * p.query_blocks; }
  // Whether another head's sums will lie where this one's do.
  FA3_DEVICE bool reused(const Piece& x) const { return x.position + p.slots < heads(); }

  // They lie as accumulators do: those of each warpgroup, warp, eight columns and lane.
  template <int Columns>
  FA3_DEVICE float4* sums(const Piece& x) const {
    int64_t row = block.first_sums(x.position) + x.row();
    return reinterpret_cast<float4*>(p.dq_sums + row * Config::kSumFloats +
                                     x.part() * Config::kFirstColumns * 64 +
                                     x.band() * Columns * 16);
  }

  // Of two times eight columns each lane of a quad writes eight of a row. Sums that are used again
  // are left at zero.
  template <int Columns, int AtOnce, class Load>
  FA3_DEVICE void store(Piece x, Load load) const {
    constexpr int groups = Columns / 8;
    static_assert(Columns % 16 == 0 && kEnd == Config::kDimQK, "columns that are none of Q's");
#pragma unroll 1
    for (int band = 0; band < kBands; ++band) {
      forget(x.index);
      char* to = target<Columns>(x, band);
      bool exists = query(x, band) < p.queries;
#pragma unroll(AtOnce > 2 ? 16 : 1)
      for (int j = 0; j < groups; j += AtOnce) {
        float4 loaded[AtOnce];
#pragma unroll
        for (int i = 0; i < AtOnce; ++i) loaded[i] = load(band * groups + min(j + i, groups - 1));
#pragma unroll
        for (int i = 0; i < AtOnce; i += 2) {
          constexpr float factor = Block::Variant::kFactor;
          uint32_t y[4];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float4 z = loaded[i + k];
            y[2 * k] = pack<Dtype>(z.x * factor, z.y * factor);
            y[2 * k + 1] = pack<Dtype>(z.z * factor, z.w * factor);
          }
          lane_transpose(y, threadIdx.x % 4, 1);
          store_if(exists && j + i < groups, to + 16 * (j + i), y);
        }
      }
    }
    if (reused(x)) {
      forget(x.index);
      float4* used = sums<Columns>(x) + lane();
#pragma unroll 4
      for (int i = 0; i < kBands * groups; ++i) used[32 * i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }

  FA3_DEVICE int query(const Piece& x, int band) const {
    int own = lane(), row = x.row(), head = Config::kGrouped ? row / p.query_blocks : 0;
    return (row - head * p.query_blocks) * Config::kBlockM + Config::sum_row(x.part()) +
           (x.band() + band) * 16 + own / 4 + own % 2 * 8;
  }

  // Where the first eight columns of this lane go.
  template <int Columns>
  FA3_DEVICE char* target(const Piece& x, int band) const {
    int batch = x.position / p.order.heads;
    int head = (x.position - batch * p.order.heads) * p.group +
               (Config::kGrouped ? x.row() / p.query_blocks : 0);
    int column = Config::sum_column(x.part()) + lane() % 4 / 2 * 8;
    return p.dq + 2 * (p.dq_at.at(batch, head, query(x, band)) + column);
  }
};

}  // namespace fa3
