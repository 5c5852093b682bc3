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

// `Lazy` keeps an old maximum until a row exceeds it by 8 in the exponent, so that rescaling is
// rare (FlashAttention-4); weights stay below 2^8, and sums and products are fp32.
template <int N, bool Lazy>
struct Softmax {
  static constexpr float kSlack = 8.0f;
  float max[2] = {-inf(), -inf()};
  float sum[2] = {0.0f, 0.0f};  // this thread's columns only, until finish()

  // Turns scores into weights. base[r] + s is the score of an element of row r. Returns whether
  // the accumulated output must be multiplied by `alpha`; uniform over the warp.
  // `Wide`: scores may be near float32's limits, where a score times `scale` is not a number to
  // work with; the maximum is then subtracted first, which costs an instruction an element.
  template <bool Guard, bool Wide>
  FA3_DEVICE bool update(float (&s)[N / 2], const float (&base)[2], const float (&scale)[2],
                         float (&alpha)[2]) {
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = s[2 * r], odd = s[2 * r + 1];
#pragma unroll
      for (int j = 1; j < N / 8; ++j) {
        even = fmaxf(even, s[4 * j + 2 * r]);
        odd = fmaxf(odd, s[4 * j + 2 * r + 1]);
      }
      top[r] = fmaxf(even, odd) + base[r];
    }
    bool rescale = true;
    if constexpr (Lazy) {
      bool above =
          (top[0] - max[0]) * scale[0] > kSlack || (top[1] - max[1]) * scale[1] > kSlack;
      rescale = __any_sync(~0u, above);
    }
    if (rescale) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float raised = fmaxf(max[r], quad_max(top[r]));
        alpha[r] = exp2_approx((max[r] - finite<Guard>(raised)) * scale[r]);
        max[r] = raised;
        sum[r] *= alpha[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float offset = (base[r] - finite<Guard>(max[r])) * scale[r];
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * r + e];
          if constexpr (Wide) x = exp2_approx((x - finite<Guard>(max[r])) * scale[r]);
          else x = exp2_approx(fmaf(x, scale[r], offset));
          sum[r] += x;
        }
      }
    }
    return rescale;
  }

  // A row that saw no key yet has -inf as its maximum; 0 in its place makes its weights 0.
  template <bool Guard>
  FA3_DEVICE static float finite(float x) {
    return Guard && x == -inf() ? 0.0f : x;
  }
};

}  // namespace fa3
