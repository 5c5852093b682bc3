// The end of a tile: O and LSE of the two rows of each thread, or the part of them that a split of
// the keys gives.
#pragma once
#include "fa3/finish_row.cuh"
#include "fa3/fragment.cuh"
#include "sm90/forward_block.cuh"

namespace fa3 {

template <class Config, class Variant>
struct ForwardEpilogue {
  using Block = ForwardBlock<Config, Variant>;
  using Params = typename Block::Params;
  using Terms = typename Block::Terms;
  using Accumulator = float[Config::kDimV / 2];

  template <class Weights>
  FA3_DEVICE static void store(const Params& p, const TileCoord& tile, const Terms& t,
                               const Weights& softmax, const Accumulator& out) {
    float sum[2] = {quad_sum(softmax.sum[0]), quad_sum(softmax.sum[1])};
    if constexpr (Config::kSplitKV) {
      if (p.order.splits > 1) return store_part(p, tile, t, softmax.max, sum, out);
    }
    store_whole(p, t, softmax.max, sum, out);
  }

 private:
  // The row's place among all of the output's rows.
  FA3_DEVICE static int64_t row_of(const Params& p, const Terms& t, int r) {
    const auto& at = t.at[Terms::head_of(r)];
    return (static_cast<int64_t>(at.batch) * p.heads + at.head) * p.queries + t.q[r];
  }

  // From registers: no shared memory, so that the next tile loads meanwhile.
  FA3_DEVICE static void store_whole(const Params& p, const Terms& t, const float (&max)[2],
                                     const float (&sum)[2], const Accumulator& out) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int h = Terms::head_of(r);
      FinishedRow row = finish_row<Variant>(t.at[h], t.head[h], t.row[r], t.q[r], t.scale[r],
                                            max[r], sum[r]);
      if (t.inside[r] && threadIdx.x % 4 == 0) p.lse[row_of(p, t, r)] = row.lse;
      char* to = static_cast<char*>(p.out) +
                 2 * (t.at[h].batch * p.out_batch + t.at[h].head * p.out_head +
                      static_cast<int64_t>(t.q[r]) * p.out_row);
      store_row<typename Config::Dtype, Config::kDimV>(out, r, row.factor, t.inside[r], to);
    }
  }

  // Unscaled, in float32, with the maximum and the sum that it belongs to.
  FA3_DEVICE static void store_part(const Params& p, const TileCoord& tile, const Terms& t,
                                    const float (&max)[2], const float (&sum)[2],
                                    const Accumulator& out) {
    int quad_lane = threadIdx.x % 4;
    int64_t first = tile.split * p.rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!t.inside[r]) continue;
      int64_t row = first + row_of(p, t, r);
      if (quad_lane == 0) p.partial_state[row] = make_float2(max[r], sum[r]);
      float2* to = reinterpret_cast<float2*>(p.partial_out + row * Config::kDimV) + quad_lane;
#pragma unroll
      for (int j = 0; j < Config::kDimV / 8; ++j)
        to[4 * j] = make_float2(out[4 * j + 2 * r], out[4 * j + 2 * r + 1]);
    }
  }
};

}  // namespace fa3
