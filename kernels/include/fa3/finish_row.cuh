// What a row's maximum and sum make of it once all its keys are seen.
#pragma once
#include "fa3/softmax.cuh"
#include "fa3/variant.cuh"

namespace fa3 {

struct FinishedRow {
  float factor;  // of the accumulated output
  float lse;     // natural log; -inf for a row that sees no key
};

// `max` is in the score's unit, see fa3/variant.cuh.
template <class Variant>
FA3_DEVICE FinishedRow finish_row(const typename Variant::At& at, const auto& head,
                                  const auto& row, int q, float scale, float max, float sum) {
  float top = max * scale;
  float factor = 1.0f;
  bool dead = sum == 0.0f;
  float lse = top * kLn2;
  if constexpr (Variant::kWideScores) {
    // Between the largest that is divided by kUnit and the least that is not.
    constexpr float kLimit = kHuge * (0.5f + 0.5f / Variant::kUnit);
    lse = fabsf(max) < kLimit ? max * Variant::kUnit : max;
  }
  if constexpr (Variant::kSink) {
    float sink = Variant::sink(at, head, row, q);
    if constexpr (Variant::kShift) sink -= Variant::shift(at, head, row, q);
    sink *= kLog2e;
    float raised = fmaxf(top, sink);
    bool nothing = raised == -inf();
    factor = nothing ? 1.0f : exp2_approx(top - raised);
    sum = sum * factor + (nothing ? 0.0f : exp2_approx(sink - raised));
    lse = raised * kLn2;
    if constexpr (Variant::kDead != Dead::kFilled) dead = sum == 0.0f;
  }
  lse += log2_approx(sum) * kLn2;
  if constexpr (Variant::kShift) lse += Variant::shift(at, head, row, q);
  factor = dead ? (Variant::kDead == Dead::kZero ? 0.0f : nan()) : __fdividef(factor, sum);
  return {factor, dead ? -inf() : lse};
}

}  // namespace fa3
