// What one attention is, apart from its shapes: the score modifier, the mask and where its key
// blocks lie. The template prints a struct that derives from PlainVariant and hides what differs.
//
// Every term sits where it changes: head terms once a tile, row terms once a row, column terms once
// a column of a key block, affine terms in (kv - q) as one FFMA, and the rest an element.
// Scores have a unit: exp2(score * scale(head)) is the weight, so that a linear score costs the one
// FFMA that softmax needs anyway. For s * 0.125 with log2(e), score is s and scale 0.125 * log2(e);
// for a softcap of 50, score is tanh(s * 0.125 / 50) and scale 50 * log2(e).
#pragma once
#include "fa3/captured.cuh"
#include "fa3/philox.cuh"

namespace fa3 {

// Keys [begin, end) hold everything the query block may see; all of [full_begin, full_end) is seen
// by each of its rows, so that those blocks run without the mask. begin >= end: nothing is seen.
struct KeyBounds {
  int begin, end, full_begin, full_end;
};

// A row that sees no key: zeros, NaN (softmax of -inf alone), or the softmax of fill() over all
// keys, which fa3/dead_rows.cuh computes afterwards for the rows whose LSE is -inf.
enum class Dead { kZero, kNan, kFilled };

// From here on what a table adds is not divided by kUnit: it is a fill like -1e9, the next number to
// which is 64 away, and the LSE of a row of it is the fill itself.
constexpr float kHuge = 0x1p29f;

template <class AuxT>
struct Site {
  const AuxT& aux;  // captured tensors and their strides
  int batch, head, queries, keys;
};

// A positive scale that underflowed, as one that still makes -inf of a score of -inf.
FA3_DEVICE float above_zero(float scale) {
  constexpr float kLeast = 1.17549435e-38f;
  return scale < kLeast ? kLeast : scale;
}

template <class AuxT>
struct PlainVariant {
  using Aux = AuxT;
  using At = Site<AuxT>;
  struct Head {};
  struct Row {};
  struct Col {};
  using TileDtype = Bf16;

  static constexpr bool kScore = false;        // score() is not the identity
  static constexpr float kInner = 0.0f;        // above 0: score() is tanh(kInner * s)
  static constexpr bool kAffine = false;       // slope(head) * (kv - q) is added to the score
  static constexpr bool kMask = false;         // mask() decides an element of a masked block
  static constexpr bool kColumnMask = false;   // column_mask() does so for a whole column of it
  static constexpr bool kRowEnd = false;       // row_end() bounds the keys of a row
  static constexpr bool kRowBegin = false;     // row_begin() does so on the left
  static constexpr bool kLeftBlocks = false;   // masked blocks lie left of the full ones too
  static constexpr bool kFiniteScores = true;  // no score is -inf where the mask allows it
  static constexpr bool kWideScores = false;   // scores times log2(e) may exceed float32
  static constexpr bool kShift = false;        // shift() belongs to the score of every key
  static constexpr bool kSink = false;         // sink() joins the row sum and has no value
  static constexpr Dead kDead = Dead::kZero;   // what a row gets that sees no key
  static constexpr bool kBlockMap = false;     // key blocks come from lists built at run time
  static constexpr bool kDenseTile = false;    // a dense (q, kv) input arrives by TMA beside K
  static constexpr bool kByDistance = false;   // by_distance() is what scores begin with, from a table
  static constexpr bool kTableOfBatch = false, kTableOfHead = false;  // whether it differs there
  static constexpr float kUnit = 1.0f;         // of such a score: it is kUnit * (kFactor * s + table)
  static constexpr float kFactor = 1.0f;       // of Q, where scores begin with something
  static constexpr bool kWeight = false;       // weight() is a factor after the softmax
  static constexpr bool kUniform = false;      // weight() takes uniform(seed(), b, h, q, kv)

  FA3_DEVICE static Head head(const At&) { return {}; }
  FA3_DEVICE static Row row(const At&, const auto&, int q) { return {}; }
  FA3_DEVICE static Col col(const At&, const auto&, int kv) { return {}; }

  FA3_DEVICE static float scale(const auto&) { return kLog2e; }
  FA3_DEVICE static float slope(const auto&) { return 0.0f; }
  FA3_DEVICE static float score(float s, const At&, const auto&, const auto&, const auto&, int q,
                                int kv, float tile) {
    return s;
  }
  FA3_DEVICE static bool mask(const At&, const auto&, const auto&, const auto&, int q, int kv,
                              float tile) {
    return true;
  }
  FA3_DEVICE static float by_distance(const At&, int distance) { return 0.0f; }  // kv - q
  FA3_DEVICE static int row_begin(const At&, const auto&, const auto&, int q) { return 0; }
  FA3_DEVICE static int row_end(const At& at, const auto&, const auto&, int q) { return at.keys; }
  // A part of the score that is the same for a whole row: weights do not depend on it, LSE does.
  FA3_DEVICE static float shift(const At&, const auto&, const auto&, int q) { return 0.0f; }
  FA3_DEVICE static float sink(const At&, const auto&, const auto&, int q) { return 0.0f; }
  FA3_DEVICE static int64_t seed(const At&, const auto&) { return 0; }
  FA3_DEVICE static float weight(const At&, const auto&, const auto&, const auto&, int q, int kv,
                                 auto number) {
    return 1.0f;
  }
  // Uniform: fill() is the same for all keys of a row, at least in float32.
  static constexpr bool kUniformFill = false;
  FA3_DEVICE static float fill(float s, const At&, const auto&, const auto&, const auto&, int q,
                               int kv) {
    return 0.0f;
  }
  FA3_DEVICE static KeyBounds bounds(const At& at, int q_begin, int q_end) {
    return {0, at.keys, 0, at.keys};
  }
};

// Whether the mask holds for one element, all its parts together.
template <class Variant>
FA3_DEVICE bool sees(const typename Variant::At& at, const auto& head, const auto& row,
                     const auto& col, int q, int kv) {
  bool seen = true;
  if constexpr (Variant::kRowEnd) seen = kv < Variant::row_end(at, head, row, q);
  if constexpr (Variant::kRowBegin) seen = seen && kv >= Variant::row_begin(at, head, row, q);
  if constexpr (Variant::kColumnMask) seen = seen && Variant::column_mask(at, head, col, kv);
  if constexpr (Variant::kMask)
    seen = seen && Variant::mask(at, head, row, col, q, kv, 0.0f);
  return seen;
}

// The factor after the softmax of one element on its own.
template <class Variant>
FA3_DEVICE float weight_of(const typename Variant::At& at, const auto& head, const auto& row,
                           const auto& col, int q, int kv) {
  Uniform random = {};
  if constexpr (Variant::kUniform)
    random = uniform(Variant::seed(at, head), at.batch, at.head, q, kv);
  return Variant::weight(at, head, row, col, q, kv, random);
}

}  // namespace fa3
