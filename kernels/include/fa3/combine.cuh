// Puts together the parts of each row that a split of the keys left (Flash-Decoding): the row's
// maximum is the greatest of its parts', and each part counts by how far its own lies below.
// Parts are added in their order, so that the bits do not depend on who finished first.
#pragma once
#include "fa3/finish_row.cuh"

namespace fa3 {

template <class AuxT>
struct CombineParams {
  const float* partial_out;     // (splits, rows, DimV)
  const float2* partial_state;  // (splits, rows): row maximum and row sum
  void* out;
  float* lse;
  int64_t out_batch, out_head, out_row;  // strides in elements
  int64_t rows;                          // batch * heads * queries
  int splits, queries, keys;
  AuxT aux;
};

template <class Config, class Variant>
struct Combine {
  using Params = CombineParams<typename Variant::Aux>;
  using At = typename Variant::At;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kPieces = ceil_div(Config::kDimV, 128);  // a lane has 4 columns of each

  // One thread block a row, grid (queries, heads, batches); its warps share the splits.
  FA3_DEVICE static void run(const Params& p) {
    __shared__ float4 sums[kWarps][kPieces][32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int q = blockIdx.x;
    At at{p.aux, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y), p.queries, p.keys};
    int64_t row = (static_cast<int64_t>(at.batch) * gridDim.y + at.head) * p.queries + q;
    auto head = Variant::head(at);
    float scale = Variant::scale(head);

    float top = -inf(), total = 0.0f;
    for (int i = lane; i < p.splits; i += 32)
      top = fmaxf(top, __ldg(p.partial_state + i * p.rows + row).x);
    top = over_warp(top, [](float a, float b) { return fmaxf(a, b); });
    for (int i = lane; i < p.splits; i += 32) {
      float2 part = __ldg(p.partial_state + i * p.rows + row);
      total += part.y * share(part.x, top, scale);
    }
    total = over_warp(total, [](float a, float b) { return a + b; });

    float4 sum[kPieces] = {};
#pragma unroll 4
    for (int i = warp; i < p.splits; i += kWarps) {
      float factor = share(__ldg(p.partial_state + i * p.rows + row).x, top, scale);
      const float4* part = reinterpret_cast<const float4*>(
          p.partial_out + (i * p.rows + row) * Config::kDimV);
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
        if (has(j, lane)) add(sum[j], factor, __ldg(part + 32 * j + lane));
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) sums[warp][j][lane] = sum[j];
    __syncthreads();
    if (warp > 0) return;

    FinishedRow done =
        finish_row<Variant>(at, head, Variant::row(at, head, q), q, scale, top, total);
    if (lane == 0) p.lse[row] = done.lse;
    uint2* out = reinterpret_cast<uint2*>(static_cast<char*>(p.out) +
                                          2 * (at.batch * p.out_batch + at.head * p.out_head +
                                               q * p.out_row));
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (!has(j, lane)) continue;
      float4 x = sum[j];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) add(x, 1.0f, sums[w][j][lane]);
      out[32 * j + lane] = make_uint2(
          pack<typename Config::Dtype>(x.x * done.factor, x.y * done.factor),
          pack<typename Config::Dtype>(x.z * done.factor, x.w * done.factor));
    }
  }

 private:
  FA3_DEVICE static bool has(int piece, int lane) {
    return 128 * piece + 4 * lane < Config::kDimV;
  }

  // Of a part whose rows saw no key, nothing.
  FA3_DEVICE static float share(float max, float top, float scale) {
    return max == -inf() ? 0.0f : exp2_approx((max - top) * scale);
  }

  FA3_DEVICE static void add(float4& sum, float factor, const float4& x) {
    sum.x = fmaf(factor, x.x, sum.x);
    sum.y = fmaf(factor, x.y, sum.y);
    sum.z = fmaf(factor, x.z, sum.z);
    sum.w = fmaf(factor, x.w, sum.w);
  }

  template <class Operation>
  FA3_DEVICE static float over_warp(float x, Operation operation) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = operation(x, __shfl_xor_sync(~0u, x, lanes));
    return x;
  }
};

}  // namespace fa3
