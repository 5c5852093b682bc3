// Rows that see no key, where eager code gives masked scores a large negative value in place of
// -inf: their weights are the softmax of Variant::fill over all keys. The attention kernel marks
// them by an LSE of -inf; they are rare (queries that are padding), so this reads no more than the
// LSEs where there are none.
#pragma once
#include "fa3/variant.cuh"

namespace fa3 {

struct Strides {
  int64_t batch, head, row;  // in elements; columns are contiguous

  FA3_DEVICE int64_t at(int b, int h, int x) const { return b * batch + h * head + x * row; }
};

template <class AuxT, class Dtype>
struct DeadRowsParams {
  const Dtype *q, *k, *v;
  unsigned short* out;
  float* lse;
  Strides q_at, k_at, v_at, out_at;
  int heads, group, queries, keys;
  int* counter;                // zero between launches; this and what follows may be null
  unsigned long long* report;  // of the host: gets `number` where no row is dead; unless that is 0
  unsigned long long number;
  AuxT aux;
};

template <class Config, class Variant>
struct DeadRows {
  using Dtype = typename Config::Dtype;
  using At = typename Variant::At;
  using Params = DeadRowsParams<typename Variant::Aux, Dtype>;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  // All keys have the same weight in a row, so that the sum of the values serves all rows.
  static constexpr bool kEven =
      Variant::kUniformFill && Variant::kFiniteScores && !Variant::kWeight;
  static constexpr int kRows = Variant::kUniformFill ? 1024 : 64;  // of a thread block
  // Values are read in 16 bytes by each thread, kKeys keys side by side.
  static constexpr int kPieces = Config::kDimV / 8, kKeys = kThreads / kPieces;

  struct Shared {
    float weights[kThreads], query[round_up(Config::kDimQK, 8)], partial[kWarps];
    float sums[kEven ? kKeys : 1][Config::kDimV], sum[Config::kDimV];
  };

  const Params& p;
  Shared& shared;
  At at;
  int kv_head;

  template <class Combine>
  FA3_DEVICE float over_block(float x, Combine combine) const {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared.partial[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) x = combine(x, shared.partial[i]);
    return x;
  }

  FA3_DEVICE float product(int kv) const {
    const Dtype* k = p.k + p.k_at.at(at.batch, kv_head, kv);
    float s = 0.0f;
    for (int d = 0; d < Config::kDimQK; ++d) s = fmaf(shared.query[d], ldg(k + d), s);
    return s;
  }

  // The sum of all values, in shared.sum.
  FA3_DEVICE void add_values() const {
    int piece = threadIdx.x % kPieces, own = threadIdx.x / kPieces;
    float sum[8] = {};
    if (own < kKeys) {
      const Dtype* v = p.v + p.v_at.at(at.batch, kv_head, 0) + 8 * piece;
#pragma unroll 8
      for (int kv = own; kv < p.keys; kv += kKeys) {
        uint4 x = __ldg(reinterpret_cast<const uint4*>(v + kv * p.v_at.row));
        add(sum, x.x), add(sum + 2, x.y), add(sum + 4, x.z), add(sum + 6, x.w);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) shared.sums[own][8 * piece + i] = sum[i];
    }
    __syncthreads();
    if (threadIdx.x < Config::kDimV) {
      float total = 0.0f;
      for (int i = 0; i < kKeys; ++i) total += shared.sums[i][threadIdx.x];
      shared.sum[threadIdx.x] = total;
    }
    __syncthreads();
  }

  FA3_DEVICE static void add(float* sum, uint32_t pair) {
    float2 x = unpack<Dtype>(pair);
    sum[0] += x.x, sum[1] += x.y;
  }

  // The dead rows from `first` on, where all keys of a row have the same score.
  FA3_DEVICE void fill_evenly(int first, const unsigned* dead) const {
    add_values();
    int piece = threadIdx.x % kPieces, own = threadIdx.x / kPieces;
    if (own >= kKeys) return;
    float sum[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = shared.sum[8 * piece + i];
    auto head = Variant::head(at);
    for (int i = own; i < kRows; i += kKeys) {
      if (!(dead[i / 32] >> i % 32 & 1)) continue;
      int q = first + i;
      auto row = Variant::row(at, head, q);
      float top = Variant::fill(0.0f, at, head, row, Variant::col(at, head, 0), q, 0);
      float factor = 1.0f, total = static_cast<float>(p.keys);
      if constexpr (Variant::kSink) add_sink(Variant::sink(at, head, row, q), top, total, factor);
      factor /= total;
      uint4 value{pack<Dtype>(sum[0] * factor, sum[1] * factor),
                  pack<Dtype>(sum[2] * factor, sum[3] * factor),
                  pack<Dtype>(sum[4] * factor, sum[5] * factor),
                  pack<Dtype>(sum[6] * factor, sum[7] * factor)};
      *reinterpret_cast<uint4*>(p.out + p.out_at.at(at.batch, at.head, q) + 8 * piece) = value;
      if (piece == 0) p.lse[lse_at(q)] = top + log2_approx(total) * kLn2;
    }
  }

  // Raises the maximum of a row to its sink and adds that to the sum; `out` is scaled with it.
  FA3_DEVICE static void add_sink(float sink, float& top, float& total, float& out) {
    float raised = fmaxf(top, sink);
    float factor = exp2_approx((top - raised) * kLog2e);
    total = total * factor + exp2_approx((sink - raised) * kLog2e);
    out *= factor;
    top = raised;
  }

  // Column threadIdx.x of the row, and its LSE. A row whose mask holds somewhere is dead because
  // every score there is -inf; the softmax of that is NaN.
  FA3_DEVICE float attend(int q, float& lse) const {
    auto head = Variant::head(at);
    auto row = Variant::row(at, head, q);
    const Dtype* query = p.q + p.q_at.at(at.batch, at.head, q);
    __syncthreads();
    if (threadIdx.x < Config::kDimQK) shared.query[threadIdx.x] = ldg(query + threadIdx.x);
    __syncthreads();
    float top = -inf(), total = 0.0f, out = 0.0f;
    bool alive = false;
    for (int base = 0; base < p.keys; base += kThreads) {
      int kv = base + threadIdx.x;
      float x = -inf(), factor = 1.0f;
      if (kv < p.keys) {
        auto col = Variant::col(at, head, kv);
        if constexpr (Variant::kWeight)
          factor = weight_of<Variant>(at, head, row, col, q, kv);
        x = Variant::fill(Variant::kUniformFill ? 0.0f : product(kv), at, head, row, col, q, kv);
        if constexpr (!Variant::kFiniteScores)
          alive = alive || sees<Variant>(at, head, row, col, q, kv);
      }
      float raised = fmaxf(top, over_block(x, fmaxf));
      float base_score = raised == -inf() ? 0.0f : raised;
      float alpha = exp2_approx((top - base_score) * kLog2e);
      float weight = exp2_approx((x - base_score) * kLog2e);
      shared.weights[threadIdx.x] = weight * factor;
      __syncthreads();
      total = total * alpha + weight;
      out *= alpha;
      if (threadIdx.x < Config::kDimV) {
        const Dtype* v = p.v + p.v_at.at(at.batch, kv_head, base) + threadIdx.x;
        for (int i = 0; i < min(kThreads, p.keys - base); ++i)
          out = fmaf(shared.weights[i], ldg(v + i * p.v_at.row), out);
      }
      top = raised;
    }
    total = over_block(total, [](float a, float b) { return a + b; });
    if constexpr (Variant::kSink) add_sink(Variant::sink(at, head, row, q), top, total, out);
    if constexpr (!Variant::kFiniteScores) {
      if (__syncthreads_or(alive)) {
        lse = -inf();
        return nan();
      }
    }
    lse = top + log2_approx(total) * kLn2;
    return out / total;
  }

  FA3_DEVICE void store(int q, float value, float lse) const {
    if (threadIdx.x < Config::kDimV)
      p.out[p.out_at.at(at.batch, at.head, q) + threadIdx.x] =
          static_cast<unsigned short>(pack<Dtype>(value, 0.0f));
    if (threadIdx.x == 0) p.lse[lse_at(q)] = lse;
  }

  FA3_DEVICE int64_t lse_at(int q) const {
    return (static_cast<int64_t>(at.batch) * p.heads + at.head) * p.queries + q;
  }

  // One thread of each block says whether it has found a dead row. The last to do so, of fewer than
  // 2^16, knows of all: the counter's halves are the blocks and those that have.
  FA3_DEVICE static void tell(const Params& p, bool found) {
    int blocks = gridDim.x * gridDim.y * gridDim.z;
    int before = atomicAdd(p.counter, found ? 0x10001 : 1);
    if ((before & 0xffff) != blocks - 1) return;
    *p.counter = 0;
    if (before >> 16 == 0 && !found)
      *static_cast<volatile unsigned long long*>(p.report) = p.number;
  }

  // Grid (ceil(queries / kRows), heads, batches).
  FA3_DEVICE static void run(const Params& p) {
    __shared__ Shared memory;
    __shared__ unsigned dead[kRows / 32];
    int head = blockIdx.y, batch = blockIdx.z, first = blockIdx.x * kRows;
    DeadRows self{p, memory, At{p.aux, batch, head, p.queries, p.keys}, head / p.group};
    const float* lse = p.lse + self.lse_at(0);
    bool any = false;
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      bool mine = first + i < p.queries && lse[first + i] == -inf();
      unsigned found = __ballot_sync(__activemask(), mine);
      if (i % 32 == 0) dead[i / 32] = found;
      any = any || mine;
    }
    any = __syncthreads_or(any);
    if (p.number != 0 && threadIdx.x == 0) tell(p, any);
    if (!any) return;
    if constexpr (kEven) return self.fill_evenly(first, dead);
    for (int i = 0; i < kRows; ++i) {
      if (!(dead[i / 32] >> i % 32 & 1)) continue;
      float of_row, value = self.attend(first + i, of_row);
      self.store(first + i, value, of_row);
    }
  }
};

}  // namespace fa3
