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
  // A uniform fill reads the values once for all rows of a thread block.
  static constexpr int kRows = Variant::kUniformFill ? 1024 : 64;
  // All keys have the same weight in all rows: the output is the mean of the values.
  static constexpr bool kMean =
      Variant::kUniformFill && Variant::kFiniteScores && !Variant::kWeight && !Variant::kSink;
  // Values are read in 16 bytes by each thread, kKeys keys side by side.
  static constexpr int kPieces = Config::kDimV / 8, kKeys = kThreads / kPieces;

  struct Shared {
    float weights[kThreads], query[round_up(Config::kDimQK, 8)], partial[kWarps];
    float sums[kMean ? kKeys : 1][Config::kDimV];
    uint32_t mean[Config::kDimV / 2];
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

  // The mean of all values, in shared.mean.
  FA3_DEVICE void find_mean() const {
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
    if (threadIdx.x < Config::kDimV / 2) {
      float total[2] = {};
      for (int i = 0; i < kKeys; ++i) {
        total[0] += shared.sums[i][2 * threadIdx.x];
        total[1] += shared.sums[i][2 * threadIdx.x + 1];
      }
      float keys = static_cast<float>(p.keys);
      shared.mean[threadIdx.x] = pack<Dtype>(total[0] / keys, total[1] / keys);
    }
    __syncthreads();
  }

  FA3_DEVICE static void add(float* sum, uint32_t pair) {
    float2 x = unpack<Dtype>(pair);
    sum[0] += x.x, sum[1] += x.y;
  }

  // The mean of the values in the dead rows from `first` on: all keys have the same score there.
  FA3_DEVICE void fill_with_mean(int first, const unsigned* dead) const {
    find_mean();
    auto head = Variant::head(at);
    float score = Variant::fill(0.0f, at, head, Variant::row(at, head, first),
                                Variant::col(at, head, 0), first, 0);
    float lse = score + log2_approx(static_cast<float>(p.keys)) * kLn2;
    int piece = threadIdx.x % kPieces, own = threadIdx.x / kPieces;
    const uint32_t* mean = shared.mean + 4 * piece;
    uint4 value{mean[0], mean[1], mean[2], mean[3]};
    for (int i = own; i < kRows && own < kKeys; i += kKeys) {
      if (!(dead[i / 32] >> i % 32 & 1)) continue;
      int q = first + i;
      *reinterpret_cast<uint4*>(p.out + p.out_at.at(at.batch, at.head, q) + 8 * piece) = value;
      if (piece == 0) p.lse[lse_at(q)] = lse;
    }
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
    if constexpr (Variant::kSink) {
      float sink = Variant::sink(at, head, row, q);
      float raised = fmaxf(top, sink);
      float factor = exp2_approx((top - raised) * kLog2e);
      total = total * factor + exp2_approx((sink - raised) * kLog2e);
      out *= factor;
      top = raised;
    }
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
    if constexpr (kMean) return self.fill_with_mean(first, dead);
    float value = 0.0f, of_row = 0.0f;
    bool known = false;
    for (int i = 0; i < kRows; ++i) {
      if (!(dead[i / 32] >> i % 32 & 1)) continue;
      // A row whose mask holds has its own answer, NaN.
      if (!known || !Variant::kFiniteScores || Variant::kWeight) value = self.attend(first + i, of_row);
      known = Variant::kUniformFill;
      self.store(first + i, value, of_row);
    }
  }
};

}  // namespace fa3
