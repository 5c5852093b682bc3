// P and dS of transposed blocks: score modifiers, their derivatives, masks, and factors after the
// softmax.
#pragma once
#include "sm90/backward_block.cuh"

namespace fa3 {

template <class Config, class Variant>
struct BackwardWeigher : BackwardBlock<Config, Variant> {
  using Block = BackwardBlock<Config, Variant>;
  using typename Block::Consumer, typename Block::Dtype, typename Block::ElementBits,
      typename Block::TileTerms;
  using Block::kAtDense, Block::kAtRows, Block::kDenseBytes, Block::kKeptBits, Block::kM,
      Block::kRowBytes, Block::kSeenBits, Block::kTogether, Block::key, Block::p, Block::piece,
      Block::shared;

  // Each lane's share of a row term of the stage's queries, in the order of accumulator columns.
  using RowValues = float[kM / 4];
  FA3_DEVICE uint32_t row_address(const Consumer& c, int term) const {
    return shared + kAtRows + c.at.stage() * kRowBytes + 4 * kM * term + 16 * (c.lane % 4);
  }
  // The LSE is loaded under the scores, unless both S^T and dP^T are there at once.
  static constexpr bool kEarlyLse = !kTogether;
  FA3_DEVICE void load_lse(const Consumer& c, RowValues& x) const {
    if constexpr (kEarlyLse) load_rows(c, 0, x);
  }
  FA3_DEVICE void load_rows(const Consumer& c, int term, RowValues& x) const {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) load_shared(x + 4 * i, row_address(c, term) + 64 * i);
  }

  // uniform(seed, b, h, q, kv) of four columns from `q` of each of this thread's rows. Four lanes
  // have the keys that a Philox call gives words for: each calls for one of the columns.
  template <class Number>
  FA3_DEVICE static void draw(const Consumer& c, const TileTerms& t, int64_t seed, int q,
                              Number (&numbers)[2][4]) {
    int own = c.lane / 4 % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      RandomWords x = philox(seed, t.at.batch, t.at.head, q + own / 2 * 8 + own % 2,
                             (t.first_kv + 8 * r) / 4);
      lane_transpose(x.word, own, 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) numbers[r][i] = Number(Uniform{x.word[i]});
    }
  }

  // Whether the mask lets an element of a masked block through.
  FA3_DEVICE static bool sees_element(const TileTerms& t, const auto& row, int r, int q) {
    bool seen = t.inside[r];
    if constexpr (Variant::kRowEnd)
      seen = seen && key(t, r) < Variant::row_end(t.at, t.head, row, q);
    if constexpr (Variant::kRowBegin)
      seen = seen && key(t, r) >= Variant::row_begin(t.at, t.head, row, q);
    if constexpr (Variant::kMask)
      seen = seen && Variant::mask(t.at, t.head, row, t.col[r], q, key(t, r), 0.0f);
    return seen;
  }

  FA3_DEVICE ElementBits seen_bits(const Consumer& c, const TileTerms& t, int block) const {
    ElementBits bits = {};
#pragma unroll
    for (int i = 0; i < kM / 4; ++i) {
      int q = min(block * kM + 2 * (c.lane % 4) + 8 * (i / 2) + i % 2, p.queries - 1);
      auto row = Variant::row(t.at, t.head, q);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int at = i / 2 * 4 + 2 * r + i % 2;
        bits.word[at / 32] |= static_cast<uint32_t>(sees_element(t, row, r, q)) << at % 32;
      }
    }
    return bits;
  }

  FA3_DEVICE ElementBits kept_bits(const Consumer& c, const TileTerms& t, int block) const {
    ElementBits bits = {};
    int64_t seed = Variant::seed(t.at, t.head);
    forget(seed);  // or its 20 round keys stay in registers
#pragma unroll
    for (int j = 0; j < kM / 16; ++j) {
      int q0 = block * kM + 2 * (c.lane % 4) + 16 * j;
      Uniform numbers[2][4] = {};
      if constexpr (Variant::kUniform) draw(c, t, seed, q0, numbers);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int q = min(q0 + i / 2 * 8 + i % 2, p.queries - 1);
        auto row = Variant::row(t.at, t.head, q);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int at = 8 * j + i / 2 * 4 + 2 * r + i % 2;
          bool kept = Variant::kept(t.at, t.head, row, t.col[r], q, key(t, r), numbers[r][i]);
          bits.word[at / 32] |= static_cast<uint32_t>(kept) << at % 32;
        }
      }
    }
    return bits;
  }

  // The factor after the softmax of element i.
  FA3_DEVICE static float factor_of(const ElementBits& kept, int i) {
    return kept[i] ? Variant::kKept : Variant::kDropped;
  }

  // P^T of one query block, times its factor unless that is bits, in place of S^T. Where both are
  // computed together:
  // Fused puts dS^T in place of dP^T, otherwise P^T times the derivative goes there.
  template <bool Masked, bool Fused>
  FA3_DEVICE void weigh(const Consumer& c, const TileTerms& t, float (&s)[kM / 2],
                        float (&dp)[kM / 2], const RowValues& lse, int block,
                        const ElementBits& seen_at, const ElementBits& kept) const {
    constexpr bool tested = Masked && !kSeenBits, drawn = Variant::kWeight && !kKeptBits;
    constexpr bool clamped = tested || Variant::kScore || drawn;
    int q0 = block * kM + 2 * (c.lane % 4);
    float base[2] = {0.0f, 0.0f};
    if constexpr (Variant::kAffine) {
#pragma unroll
      for (int r = 0; r < 2; ++r) base[r] = t.slope * static_cast<float>(key(t, r) - q0);
    }
    float late_lse[4], delta[4], norm[4];
    uint32_t dense[4];
    float numbers[2][4];
#pragma unroll
    for (int j = 0; j < kM / 8; ++j) {
      if (j % 2 == 0) {
        if constexpr (!kEarlyLse) load_shared(late_lse, row_address(c, 0) + 32 * j);
        if constexpr (drawn && Variant::kUniform) draw(c, t, Variant::seed(t.at, t.head), q0 + 8 * j, numbers);
        if constexpr (kTogether && Fused) load_shared(delta, row_address(c, 1) + 32 * j);
        if constexpr (Variant::kDenseTile)
          load_transposed(dense, piece(c, kAtDense + c.at.stage() * kDenseBytes, j / 2));
        if constexpr (Variant::kWideScores) load_shared(norm, row_address(c, 2) + 32 * j);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int q = q0 + 8 * j + e;
        if constexpr (clamped) q = min(q, p.queries - 1);
        auto row = Variant::row(t.at, t.head, q);
        float offset = kEarlyLse ? lse[2 * j + e] : late_lse[j % 2 * 2 + e];
        if constexpr (Variant::kAffine)
          offset = fmaf(t.slope * t.scale, static_cast<float>(8 * j + e), offset);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int i = 4 * j + 2 * r + e;
          float x = s[i], extra = 0.0f;
          float d = 1.0f;
          if constexpr (Variant::kDenseTile) {
            float2 pair = unpack<typename Variant::TileDtype>(dense[j % 2 * 2 + r]);
            extra = e == 0 ? pair.x : pair.y;
          }
          if constexpr (Variant::kDerivative)
            d = Variant::derivative(x, t.at, t.head, row, t.col[r], q, key(t, r), extra);
          if constexpr (Variant::kScore)
            x = Variant::score(x, t.at, t.head, row, t.col[r], q, key(t, r), extra);
          if constexpr (Variant::kAffine) x += base[r];
          float exponent = fmaf(x, t.scale, -offset);
          // Not as an FMA with the score's last product: near float32's limits what that rounds off
          // is not small.
          if constexpr (Variant::kWideScores)
            exponent = fmaf(__fsub_rn(x, offset), t.scale, -norm[j % 2 * 2 + e]);
          float weight = exp2_approx(exponent);
          if constexpr (Masked) {
            bool seen;
            if constexpr (tested) seen = sees_element(t, row, r, q);
            else seen = seen_at[i];
            if (!seen) weight = 0.0f;
          }
          float factor = 1.0f;
          if constexpr (drawn)
            factor = Variant::weight(t.at, t.head, row, t.col[r], q, key(t, r),
                                     Variant::kUniform ? numbers[r][j % 2 * 2 + e] : 0.0f);
          s[i] = weight * factor;
          if constexpr (kKeptBits) factor = factor_of(kept, i);
          if constexpr (kTogether) {
            float ds = weight * d;
            if constexpr (Fused) ds *= dp[i] * factor - delta[j % 2 * 2 + e];
            if constexpr (Masked) ds = weight == 0.0f ? 0.0f : ds;
            dp[i] = ds;
          }
        }
      }
    }
  }

  FA3_DEVICE static void pack_all(uint32_t (&to)[kM / 4], const float (&x)[kM / 2]) {
#pragma unroll
    for (int i = 0; i < kM / 4; ++i) to[i] = pack<Dtype>(x[2 * i], x[2 * i + 1]);
  }
  // Times the factors after the softmax.
  FA3_DEVICE static void pack_kept(uint32_t (&to)[kM / 4], const float (&x)[kM / 2],
                                   const ElementBits& kept) {
#pragma unroll
    for (int i = 0; i < kM / 4; ++i)
      to[i] = pack<Dtype>(x[2 * i] * factor_of(kept, 2 * i),
                          x[2 * i + 1] * factor_of(kept, 2 * i + 1));
  }
};

}  // namespace fa3
