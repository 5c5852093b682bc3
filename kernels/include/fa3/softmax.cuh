// Online softmax on the accumulator layout of wgmma m64nN: a thread holds two rows, eight apart,
// and in each the columns 8j + 2 * (lane % 4) + {0, 1}; element [4j + 2r + e].
#pragma once
#include "fa3/ptx.cuh"

namespace fa3 {

FA3_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

FA3_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// scale * tanh(inner * x) for (inner * x)^2 <= kLargest, as x times a polynomial in x * x. Minimax in
// the relative error, 3.0e-4, which is less than a 16-bit type's rounding.
struct NearTanh {
  static constexpr float kLargest = 0.64f;
  float k[3] = {0.99969673f, -0.32457387f, 0.09357481f};

  FA3_DEVICE NearTanh(float inner, float scale) {
    float power = inner * scale;
#pragma unroll
    for (int i = 0; i < 3; ++i, power *= inner * inner) k[i] *= power;
  }

  FA3_DEVICE float over_x(float square) const {
    return fmaf(fmaf(k[2], square, k[1]), square, k[0]);
  }
};

// A row's maximum may be older than its scores: weights up to kLargestSum are as exact as those
// below 1 in either 16-bit type, and sums and products are fp32. It is raised, and what is summed up
// so far scaled, only where a score exceeds it by kSlack in the exponent (as in FlashAttention-4), or
// where the weights themselves turn out too large, which saves looking for the largest score.
// `Wide`: scores may be near float32's limits, where a score times `scale` is not a number to work
// with; maxima that are not near 0 are then subtracted first.
template <int N, bool Wide>
struct Softmax {
  static constexpr float kSlack = 8.0f;
  static constexpr float kLargestSum = 4096.0f;  // of a thread's weights in a row of a block
  float max[2] = {-inf(), -inf()};
  float sum[2] = {0.0f, 0.0f};  // this thread's columns only, until finish()
  bool small = true;            // no score so far was too far from 0 for weigh_capped()

  // Weights of a block's first columns in fp32, and their sums.
  template <int Columns>
  struct Ahead {
    float weight[Columns > 0 ? Columns / 2 : 1], part[2] = {0.0f, 0.0f};
  };

  // Whether weights can be measured against the maxima of all of the warp's rows.
  FA3_DEVICE bool ready() const { return __all_sync(~0u, near(max[0]) && near(max[1])); }

  // Whether these scores of a row exceed its maximum so far that their weights would be large;
  // base[r] + s is the score of an element of row r.
  FA3_DEVICE bool exceeded(const float (&s)[N / 2], const float (&base)[2],
                           const float (&scale)[2]) const {
    bool above = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) above = above || (top(s, base, r) - max[r]) * scale[r] > kSlack;
    return __any_sync(~0u, above) || (Wide && !ready());
  }

  // Raises the maxima to those of these scores. Sums are scaled by `alpha`, and so must O be.
  template <bool Guard>
  FA3_DEVICE void raise(float (&s)[N / 2], const float (&base)[2], const float (&scale)[2],
                        float (&alpha)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float raised = fmaxf(max[r], quad_max(top(s, base, r)));
      alpha[r] = exp2_approx((max[r] - finite<Guard>(raised)) * scale[r]);
      max[r] = raised;
      sum[r] *= alpha[r];
      if constexpr (Wide) {
        float far = near(raised) ? 0.0f : finite<Guard>(raised);
#pragma unroll
        for (int i = 0; i < N / 4; ++i) s[i / 2 * 4 + 2 * r + i % 2] -= far;
      }
    }
  }

  // The weights of these scores as the A operand of a product; factor(j, x) may change those of
  // eight columns after they are summed up. False: they are too large, and maxima must be raised for
  // them. Of `last` weights that is not asked.
  template <bool Guard, class Dtype>
  FA3_DEVICE bool weigh(const float (&s)[N / 2], const float (&base)[2], const float (&scale)[2],
                        bool last, uint32_t (&weights)[N / 4], const auto& factor) {
    float offset[2], part[2] = {0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      offset[r] = (base[r] - finite<Guard>(max[r])) * scale[r];
      if constexpr (Wide) offset[r] = near(max[r]) ? offset[r] : 0.0f;  // raise() subtracted it
    }
    auto exponent = [&](int i, float x) { return fmaf(x, scale[i / 2], offset[i / 2]); };
    exponentials<Dtype>(s, exponent, part, weights, factor);
    if (!last && too_large(part)) return false;
    sum[0] += part[0];
    sum[1] += part[1];
    return true;
  }

  // The same in two parts, where ready(): the first leaves alone what a product still reads. False
  // of either: maxima must be raised.
  template <int Columns>
  FA3_DEVICE bool weigh_ahead(const float (&s)[N / 2], const float (&base)[2],
                              const float (&scale)[2], Ahead<Columns>& ahead) const {
#pragma unroll
    for (int i = 0; i < Columns / 2; ++i) {
      int r = i / 2 % 2;
      ahead.weight[i] = exp2_approx(fmaf(s[i], scale[r], (base[r] - max[r]) * scale[r]));
      ahead.part[r] += ahead.weight[i];
    }
    return !too_large(ahead.part);
  }
  template <class Dtype, int Columns>
  FA3_DEVICE bool weigh_rest(const float (&s)[N / 2], const float (&base)[2],
                             const float (&scale)[2], Ahead<Columns>& ahead,
                             uint32_t (&weights)[N / 4]) {
#pragma unroll
    for (int i = 0; i < Columns / 4; ++i)
      weights[i] = pack<Dtype>(ahead.weight[2 * i], ahead.weight[2 * i + 1]);
    auto exponent = [&](int i, float x) {
      return fmaf(x, scale[i / 2], (base[i / 2] - max[i / 2]) * scale[i / 2]);
    };
    exponentials<Dtype, Columns>(s, exponent, ahead.part, weights,
                                 [](int, const float (&)[4]) {});
    if (too_large(ahead.part)) return false;
    sum[0] += ahead.part[0];
    sum[1] += ahead.part[1];
    return true;
  }

  // The weights of scores tanh(inner * s) from s itself, without the tanh, which takes as long as
  // the exponential and on the same unit. False: one of them is too large, or too far from 0.
  template <class Dtype>
  FA3_DEVICE bool weigh_capped(const float (&s)[N / 2], float inner, const float (&scale)[2],
                               uint32_t (&weights)[N / 4]) {
    float part[2] = {0.0f, 0.0f};
    NearTanh tanh[2] = {{inner, scale[0]}, {inner, scale[1]}};
    uint32_t largest = 0;  // s * s; floats that are not negative, and NaN, are ordered as integers
    auto exponent = [&](int i, float x) {
      float square = x * x;
      largest = ::max(largest, __float_as_uint(square));
      return fmaf(tanh[i / 2].over_x(square), x, -max[i / 2] * scale[i / 2]);
    };
    exponentials<Dtype>(s, exponent, part, weights, [](int, const float (&)[4]) {});
    bool above = part[0] > kLargestSum || part[1] > kLargestSum;
    bool far = largest > __float_as_uint(NearTanh::kLargest / inner / inner);
    if (__any_sync(~0u, above || far)) {
      small = !__any_sync(~0u, far);
      return false;
    }
    sum[0] += part[0];
    sum[1] += part[1];
    return true;
  }

 private:
  FA3_DEVICE static bool too_large(const float (&part)[2]) {
    return __any_sync(~0u, part[0] > kLargestSum || part[1] > kLargestSum);
  }

  // Weights exp2(exponent(i, s)) of element i of each four from a column on, packed, and their sums
  // in `part`.
  template <class Dtype, int First = 0>
  FA3_DEVICE static void exponentials(const float (&s)[N / 2], const auto& exponent,
                                      float (&part)[2], uint32_t (&weights)[N / 4],
                                      const auto& factor) {
#pragma unroll
    for (int j = First / 8; j < N / 8; ++j) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = exp2_approx(exponent(i, s[4 * j + i]));
        part[i / 2] += x[i];
      }
      factor(j, x);
      weights[2 * j] = pack<Dtype>(x[0], x[1]);
      weights[2 * j + 1] = pack<Dtype>(x[2], x[3]);
    }
  }

  // The largest of this thread's scores of row r.
  FA3_DEVICE static float top(const float (&s)[N / 2], const float (&base)[2], int r) {
    float even = s[2 * r], odd = s[2 * r + 1];
#pragma unroll
    for (int j = 1; j < N / 8; ++j) {
      even = fmaxf(even, s[4 * j + 2 * r]);
      odd = fmaxf(odd, s[4 * j + 2 * r + 1]);
    }
    return fmaxf(even, odd) + base[r];
  }

  // Wide: near enough to 0 that max * scale, rounded, is still the same to a weight.
  FA3_DEVICE static bool near(float max) { return fabsf(max) < (Wide ? 4096.0f : inf()); }

  // A row that saw no key yet has -inf as its maximum; 0 in its place makes its weights 0.
  template <bool Guard>
  FA3_DEVICE static float finite(float x) {
    return Guard && x == -inf() ? 0.0f : x;
  }
};

}  // namespace fa3
