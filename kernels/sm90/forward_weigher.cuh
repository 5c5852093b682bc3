// From the scores of a key block to its weights: score modifier, mask, softmax, and the factor after
// it, on the accumulators of one consumer warpgroup.
#pragma once
#include "fa3/fragment.cuh"
#include "fa3/softmax.cuh"
#include "sm90/forward_block.cuh"

namespace fa3 {

template <class Config, class Variant>
struct ForwardWeigher : ForwardBlock<Config, Variant> {
  using Base = ForwardBlock<Config, Variant>;
  using typename Base::Pipe, typename Base::Terms;
  using Base::kN, Base::p, Base::shared;
  using Weights = Softmax<kN, Variant::kWideScores>;
  using Scores = float[kN / 2];

  int warpgroup, lane;
  Pipe dense;
  Weights softmax;

  FA3_DEVICE ForwardWeigher(const Base& block)
      : Base(block),
        warpgroup(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)),
        lane(threadIdx.x % 32) {}

  FA3_DEVICE void release(int which) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(this->barrier(which));
  }

  FA3_DEVICE void wait_dense() const {
    mbarrier_wait(this->barrier(Base::kDenseFull + dense.stage()), dense.parity());
  }

  // ldmatrix may still be under way, and the next tile, which TMA writes, must not overtake it.
  FA3_DEVICE void release_dense() {
    fence_proxy_async();
    release(Base::kDenseEmpty + dense.stage());
    dense.advance();
  }

  // The bounds of each row's keys, from this thread's first column; and a bit for each of the
  // block's keys, from the same.
  struct MaskTerms {
    int end[2], begin[2];
    uint32_t columns[ceil_div(kN, 32)];
  };

  FA3_DEVICE MaskTerms mask_terms(const Terms& t, int block) const {
    MaskTerms m;
    int kv0 = block * kN + 2 * (lane % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int h = Terms::head_of(r);
      m.end[r] = p.keys - kv0;
      if constexpr (Variant::kRowEnd)
        m.end[r] = min(m.end[r], Variant::row_end(t.at[h], t.head[h], t.row[r], t.q[r]) - kv0);
      if constexpr (Variant::kRowBegin)
        m.begin[r] = Variant::row_begin(t.at[h], t.head[h], t.row[r], t.q[r]) - kv0;
    }
    if constexpr (Variant::kColumnMask) {
#pragma unroll
      for (int i = 0; i < ceil_div(kN, 32); ++i) {
        int kv = min(block * kN + 32 * i + lane, p.keys - 1);
        auto col = Variant::col(t.at[0], t.head[0], kv);
        bool seen = Variant::column_mask(t.at[0], t.head[0], col, kv);
        m.columns[i] = __ballot_sync(~0u, seen) >> 2 * (lane % 4);
      }
    }
    return m;
  }

  // Of a stage of the dense input, which is there.
  FA3_DEVICE auto dense_reader(int stage) const {
    int row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;
    return typename Base::Dense::Reader{shared + Base::kAtDense + stage * Base::kDenseBytes, row};
  }

  // Whether the score modifier takes the dense input. Scores that begin with it need none.
  static constexpr bool kDenseLast = Variant::kDenseTile && !Config::kDenseFirst;

  // Of the stage that keys are in.
  FA3_DEVICE void begin_with_dense(Scores& s, int stage) const {
    auto reader = dense_reader(stage);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      float2 tile[2];
      reader.take(j, tile);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        s[4 * j + 2 * r] = tile[r].x;
        s[4 * j + 2 * r + 1] = tile[r].y;
      }
    }
  }

  // The elements of this thread's second row are those of its first, eight columns further left.
  FA3_DEVICE void begin_with_table(Scores& s, const Terms& t, int block) const {
    const float* zero = p.table + DistanceTable<Variant>::zero(t.at[0], p.heads);
    int least = 1 - p.queries, most = p.keys - 1;
    int first = block * kN + 2 * (lane % 4) - t.q[0];
    auto take = [&](auto from) {
      float2 left = {from(-8), from(-7)};
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        s[4 * j + 2] = left.x;
        s[4 * j + 3] = left.y;
        left = {from(8 * j), from(8 * j + 1)};
        s[4 * j] = left.x;
        s[4 * j + 1] = left.y;
      }
    };
    if (__all_sync(~0u, first - 8 >= least && first + kN - 7 <= most)) {
      const float* near = zero + first;
      take([&](int i) { return ldg(near + i); });
    } else {
      take([&](int i) { return ldg(zero + min(max(first + i, least), most)); });
    }
  }

  // Whether row r sees the key kv, `column` columns from this thread's first.
  FA3_DEVICE static bool sees_element(const Terms& t, const MaskTerms& m, const auto& col, int r,
                                      int column, int kv, float extra) {
    int h = Terms::head_of(r);
    bool seen = column < m.end[r];
    if constexpr (Variant::kRowBegin) seen = seen && column >= m.begin[r];
    if constexpr (Variant::kColumnMask)
      seen = seen && (m.columns[column / 32] & 1u << column % 32);
    if constexpr (Variant::kMask)
      seen = seen && Variant::mask(t.at[h], t.head[h], t.row[r], col, t.q[r], kv, extra);
    return seen;
  }

  // Score modifier and mask of one key block. What is added to all scores of a row goes to `base`.
  template <bool Masked>
  FA3_DEVICE void modify(const Terms& t, Scores& s, int block, float (&base)[2]) {
    int kv0 = block * kN + 2 * (lane % 4);  // this thread's first column
    base[0] = base[1] = 0.0f;
    if constexpr (kDenseLast) wait_dense();
    if constexpr (Variant::kAffine) {
      float block_start = static_cast<float>(block * kN);
#pragma unroll
      for (int r = 0; r < 2; ++r) base[r] = t.slope[r] * (block_start + t.distance[r]);
    }
    MaskTerms m;
    if constexpr (Masked) m = mask_terms(t, block);
    auto reader = dense_reader(dense.stage());
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      float2 tile[2];
      if constexpr (kDenseLast) reader.take(j, tile);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int column = 8 * j + e, kv = kv0 + column;
        if constexpr (Masked) kv = min(kv, p.keys - 1);
        typename Variant::Col col[Terms::kHeads];
#pragma unroll
        for (int h = 0; h < Terms::kHeads; ++h) col[h] = Variant::col(t.at[h], t.head[h], kv);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int h = Terms::head_of(r);
          float& x = s[4 * j + 2 * r + e];
          float extra = kDenseLast ? (e == 0 ? tile[r].x : tile[r].y) : 0.0f;
          if constexpr (Variant::kAffine) x = fmaf(t.slope[r], static_cast<float>(column), x);
          if constexpr (Variant::kScore && !Config::kDenseFirst)
            x = Variant::score(x, t.at[h], t.head[h], t.row[r], col[h], t.q[r], kv, extra);
          if constexpr (Masked) {
            bool seen = sees_element(t, m, col[h], r, column, kv, extra);
            if (!seen) x = -inf();
          }
        }
      }
    }
    if constexpr (kDenseLast) release_dense();
  }

  // Whether maxima are raised before there are weights. Random numbers are not drawn twice: what
  // they follow is looked at.
  static constexpr bool kOptimistic = Config::kOptimistic && !Variant::kWeight;
  FA3_DEVICE bool must_raise(const Terms& t, const Scores& s, const float (&base)[2]) const {
    return kOptimistic ? !softmax.ready() : softmax.exceeded(s, base, t.scale);
  }

  // Whether scores of blocks without a mask need no modifier where they are near 0.
  static constexpr bool kCapped = kOptimistic && Variant::kInner > 0.0f;
  FA3_DEVICE bool weigh_capped(const Terms& t, const Scores& s, uint32_t (&weights)[kN / 4]) {
    return softmax.template weigh_capped<typename Config::Dtype>(s, Variant::kInner, t.scale, weights);
  }

  // Columns whose weights are computed while the values before are still multiplied.
  static constexpr int kAhead = kOptimistic && !kCapped ? Config::kAhead : 0;
  using Ahead = typename Weights::template Ahead<kAhead>;

  // The weights of modified scores, as the A operand of the values product. `out` is scaled where a
  // row's maximum is raised for them.
  template <bool Masked, int Columns>
  FA3_DEVICE void weigh(const Terms& t, Scores& s, int block, const float (&base)[2], bool raise,
                        uint32_t (&weights)[kN / 4], float (&out)[Columns]) {
    constexpr bool guard = Masked || !Variant::kFiniteScores;
    RandomKeys keys(Variant::kUniform ? Variant::seed(t.at[0], t.head[0]) : 0);
    if constexpr (Variant::kUniform) keys.hold();
    auto factor = [&](int j, float (&x)[4]) {
      if constexpr (Variant::kWeight) reweigh<Masked>(t, keys, x, block * kN + 8 * j);
    };
#pragma unroll 1
    for (;; raise = true) {
      if (raise) {
        float alpha[2];
        softmax.template raise<guard>(s, base, t.scale, alpha);
#pragma unroll
        for (int i = 0; i < Columns; ++i) out[i] *= alpha[i / 2 % 2];
      }
      using Dtype = typename Config::Dtype;
      bool last = raise || !kOptimistic;
      if (softmax.template weigh<guard, Dtype>(s, base, t.scale, last, weights, factor)) break;
    }
  }

  // The factors after the softmax, which the row sum knows nothing of, of this thread's weights in
  // the eight columns from kv0 on.
  template <bool Masked>
  FA3_DEVICE void reweigh(const Terms& t, const RandomKeys& keys, float (&x)[4], int kv0) const {
    Uniform random[2][2] = {};
    if constexpr (Variant::kUniform) uniforms(t, keys, kv0, random);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int kv = kv0 + 2 * (lane % 4) + e;
      if constexpr (Masked) kv = min(kv, p.keys - 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int h = Terms::head_of(r);
        auto col = Variant::col(t.at[h], t.head[h], kv);
        x[2 * r + e] *=
            Variant::weight(t.at[h], t.head[h], t.row[r], col, t.q[r], kv, random[r][e]);
      }
    }
  }

  // Of this thread's two columns from kv0 on, in both rows. Two lanes hold four columns side by
  // side, which are the words of one counter: each lane draws one row's and passes half of it on.
  FA3_DEVICE void uniforms(const Terms& t, const RandomKeys& keys, int kv0,
                           Uniform (&random)[2][2]) const {
    int own = lane % 2;
    const auto& at = t.at[own == 0 ? 0 : Terms::head_of(1)];
    RandomWords words =
        philox(keys, at.batch, at.head, own == 0 ? t.q[0] : t.q[1], kv0 / 4 + lane % 4 / 2);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      uint32_t low = words.word[e], high = words.word[2 + e];
      uint32_t kept = own == 0 ? low : high;
      uint32_t passed = __shfl_xor_sync(~0u, own == 0 ? high : low, 1);
      random[0][e] = {own == 0 ? kept : passed};
      random[1][e] = {own == 0 ? passed : kept};
    }
  }
};

}  // namespace fa3
