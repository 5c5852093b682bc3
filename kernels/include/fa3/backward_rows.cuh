// Before and after the backward's main kernel: what each query row needs of LSE and dO, dQ from its
// fp32 sums unless the main kernel does that (sm90/query_gradient.cuh), and dV of rows that are
// NaN. The first two read and write each of their tensors once, and take the heads in the reverse
// of the main kernel's order: those that it begins with are then in L2, and those it ends with.
#pragma once
#include "fa3/fragment.cuh"
#include "fa3/query_blocks.cuh"

namespace fa3 {

struct RowStrides {
  int64_t batch, head, row;  // in elements; columns are contiguous

  FA3_DEVICE int64_t at(int b, int h, int x) const { return b * batch + h * head + x * row; }
};

template <class AuxT>
struct RowTermsParams {
  const char *out, *dout;
  const float *lse, *dlse;  // (batch, heads, queries); dlse may be null
  float* rows;              // (batch, heads, query blocks, kRowTerms, BlockM)
  float* dq_sums;           // cleared here
  float* delta;             // (batch, heads, queries), or null
  unsigned char* dead;      // the same: 1 where a row sees no key; only if Variant::kFindDead
  RowStrides out_at, dout_at;
  int heads, queries, keys;
  int sums;  // this, and what follows to `counters`, only where Config::kFinishes or kBeside: of
             // how many query blocks, the first ones, dq_sums has room for, or are to be prepared
  int* progress;  // cleared too
  int counters;   // in progress, 4 bytes each
  int group;
  const char *q, *k;  // read only where Variant::kWideScores
  RowStrides q_at, k_at;
  AuxT aux;
};

// LSE in the exponent's unit, infinity where a row has no weight; delta = rowsum(dO * O) - dLSE; and
// with wide scores log2 of what exp(score - LSE) sums to, not 0 where the LSE is too large for the
// logarithm of a sum: from 1e4 on it holds less of that than three digits.
template <class Variant>
constexpr int kRowTerms = Variant::kWideScores ? 3 : 2;

// Where the term of a row stands within its block: the four that a lane of the main kernel needs of
// 16 rows (an accumulator's columns) side by side.
FA3_DEVICE int row_slot(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
}

template <class Config, class Variant>
struct RowTerms {
  using Dtype = typename Config::Dtype;
  using Params = RowTermsParams<typename Variant::Aux>;
  static constexpr int kM = Config::kBlockM;
  static constexpr int kThreads = 256;
  static constexpr int kPieces = Config::kDimV / 8;  // of 16 bytes in a row
  static constexpr int kLanes =
      kPieces > 16 ? 32 : kPieces > 8 ? 16 : kPieces > 4 ? 8 : kPieces > 2 ? 4 : kPieces;
  static constexpr int kRowsAtOnce = kThreads / kLanes;

  // Grid (query blocks, heads, batches).
  FA3_DEVICE static void run(const Params& p) {
    int head = gridDim.y - 1 - blockIdx.y, batch = gridDim.z - 1 - blockIdx.z;
    int64_t block = (static_cast<int64_t>(batch) * p.heads + head) * gridDim.x + blockIdx.x;
    float4* sums = reinterpret_cast<float4*>(p.dq_sums + block * Config::kSumFloats);
    if (!(Config::kFinishes || Config::kBeside) || block < p.sums) {
      for (int i = threadIdx.x; i < Config::kSumFloats / 4; i += kThreads)
        sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    if (Config::kFinishes && blockIdx.x == 0) {
      int i = (batch * p.heads + head) * kThreads + threadIdx.x;
      if (i < p.counters) p.progress[i] = 0;
    }
    if constexpr (Config::kBeside) {
      int threads = gridDim.x * gridDim.y * gridDim.z * kThreads;
      int first = ((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * kThreads;
      for (int i = first + threadIdx.x; i < p.counters; i += threads) p.progress[i] = 0;
      if (block >= p.sums) return;
    }
    typename Variant::At at{p.aux, batch, head, p.queries, p.keys};
    int piece = threadIdx.x % kLanes;
    float* rows = p.rows + block * kRowTerms<Variant> * kM;
#pragma unroll
    for (int i = 0; i < ceil_div(kM, kRowsAtOnce); ++i) {
      int inside = i * kRowsAtOnce + threadIdx.x / kLanes;
      int q = blockIdx.x * kM + inside;
      float sum = 0.0f;
      bool exists = q < p.queries && inside < kM;
      if (exists && piece < kPieces)
        sum = product(piece_of(p.out, p.out_at, at, q, piece),
                      piece_of(p.dout, p.dout_at, at, q, piece));
      sum = row_sum(sum);
      if (piece > 0 || inside >= kM) continue;
      keep(p, at, rows, inside, q, exists, sum);
    }
    if constexpr (Variant::kWideScores || Variant::kFindDead) {
      for (int inside = threadIdx.x / 32; inside < kM; inside += kThreads / 32) {
        int q = blockIdx.x * kM + inside;
        int64_t row = (static_cast<int64_t>(batch) * p.heads + head) * p.queries + q;
        float norm = 0.0f;
        if (q < p.queries) {
          if constexpr (Variant::kWideScores) norm = weight_of(p, at, q, p.lse[row]);
          if constexpr (Variant::kFindDead) p.dead[row] = !sees_any(at, q);
        }
        if (Variant::kWideScores && threadIdx.x % 32 == 0) rows[2 * kM + row_slot(inside)] = norm;
      }
    }
  }

  // A lane's piece of a row of O or dO.
  FA3_DEVICE static uint4 piece_of(const char* x, const RowStrides& strides,
                                   const typename Variant::At& at, int q, int piece) {
    return __ldg(reinterpret_cast<const uint4*>(x + 2 * strides.at(at.batch, at.head, q)) + piece);
  }

  // rowsum(dO * O) in all of a row's kLanes lanes, from the product of each one's pieces.
  FA3_DEVICE static float row_sum(float sum) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
      sum += __shfl_xor_sync(~0u, sum, lanes);
    return sum;
  }

  // The terms of a row of which `sum` is rowsum(dO * O); past the last query those of none.
  FA3_DEVICE static void keep(const Params& p, const typename Variant::At& at, float* rows,
                              int inside, int q, bool exists, float sum) {
    float lse = inf();
    if (exists) {
      int64_t row = (static_cast<int64_t>(at.batch) * p.heads + at.head) * p.queries + q;
      lse = __ldg(p.lse + row);
      if (p.dlse != nullptr) sum -= __ldg(p.dlse + row);
      // A row of nothing but scores of -inf has weights of NaN, unless it is to have none.
      constexpr bool lost = Variant::kFiniteScores || Variant::kDead == Dead::kZero;
      if (lse == -inf()) lse = lost ? inf() : lse, sum = 0.0f;
      if (p.delta != nullptr) p.delta[row] = sum;
      auto own = Variant::head(at);
      if constexpr (Variant::kShift)
        lse -= Variant::shift(at, own, Variant::row(at, own, q), q);
      if constexpr (!Variant::kWideScores) lse *= kLog2e;
    }
    rows[row_slot(inside)] = lse;
    rows[kM + row_slot(inside)] = sum;
  }

  // One warp: log2 of what the row's weights sum to by an LSE that is large.
  FA3_DEVICE static float weight_of(const Params& p, const typename Variant::At& at, int q,
                                    float lse) {
    if (!(fabsf(lse) > 1e4f) || fabsf(lse) == inf()) return 0.0f;
    auto head = Variant::head(at);
    auto row = Variant::row(at, head, q);
    const Dtype* query = reinterpret_cast<const Dtype*>(p.q) + p.q_at.at(at.batch, at.head, q);
    const Dtype* keys = reinterpret_cast<const Dtype*>(p.k);
    keys += p.k_at.at(at.batch, at.head / p.group, 0);
    float total = 0.0f;
    for (int kv = threadIdx.x % 32; kv < at.keys; kv += 32) {
      auto col = Variant::col(at, head, kv);
      if (!sees<Variant>(at, head, row, col, q, kv)) continue;
      const Dtype* key = keys + kv * p.k_at.row;
      float s = 0.0f;
      for (int d = 0; d < Config::kDimQK; ++d) s = fmaf(ldg(query + d), ldg(key + d), s);
      float tile = Variant::dense(at, head, row, col, q, kv, 0.0f);
      float x = Variant::score(s, at, head, row, col, q, kv, tile);
      total += exp2_approx(__fsub_rn(x, lse) * kLog2e);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
    if constexpr (Variant::kSink)
      total += exp2_approx((Variant::sink(at, head, row, q) - lse) * kLog2e);
    return total > 0.0f ? log2_approx(total) : 0.0f;
  }

  // One warp: whether a row sees a key.
  FA3_DEVICE static bool sees_any(const typename Variant::At& at, int q) {
    auto head = Variant::head(at);
    auto row = Variant::row(at, head, q);
    int begin = 0, end = at.keys;
    if constexpr (Variant::kRowBegin) begin = max(Variant::row_begin(at, head, row, q), 0);
    if constexpr (Variant::kRowEnd) end = min(Variant::row_end(at, head, row, q), end);
    for (; begin < end; begin += 32) {
      int kv = min(begin + static_cast<int>(threadIdx.x % 32), end - 1);
      bool here = sees<Variant>(at, head, row, Variant::col(at, head, kv), q, kv);
      if (__any_sync(~0u, here)) return true;
    }
    return false;
  }

  FA3_DEVICE static float product(uint32_t a, uint32_t b) {
    float2 x = unpack<Dtype>(a), y = unpack<Dtype>(b);
    return fmaf(x.x, y.x, x.y * y.y);
  }
  FA3_DEVICE static float product(const uint4& a, const uint4& b) {
    return product(a.x, b.x) + product(a.y, b.y) + product(a.z, b.z) + product(a.w, b.w);
  }
};

struct QueryGradientParams {
  const float* dq_sums;
  char* dq;
  RowStrides dq_at;
  int heads, queries;
  int first_batch, first;  // only where Config::kBeside: of the query blocks of all heads
};

// dQ from the sums, which lie as the main kernel's accumulators do: those of each warpgroup, warp,
// group of four and lane.
template <class Config, class Variant>
struct QueryGradient {
  using Dtype = typename Config::Dtype;
  static constexpr int kThreads = Config::kSumThreads;

  // Grid (query blocks, heads, batches).
  FA3_DEVICE static void run(const QueryGradientParams& p) {
    if (threadIdx.x / 128 + 1 < Config::kWarpgroups) store<Config::kFirstColumns>(p);
    else store<Config::kLastColumns>(p);
  }

  template <int Columns>
  FA3_DEVICE static void store(const QueryGradientParams& p) {
    int head = gridDim.y - 1 - blockIdx.y, batch = gridDim.z - 1 - blockIdx.z;
    if constexpr (Config::kBeside) batch += p.first_batch;
    int64_t block = (static_cast<int64_t>(batch) * p.heads + head) * gridDim.x + blockIdx.x;
    if (Config::kBeside && block < p.first) return;
    float x[Columns / 2];
    load<Columns>(p, x, block, threadIdx.x);
    keep<Columns>(p, x, p.queries, blockIdx.x, head, batch, threadIdx.x);
  }

  // Of a query block's sums the part of a thread among kThreads.
  template <int Columns>
  FA3_DEVICE static void load(const auto& p, float (&x)[Columns / 2], int64_t block, int thread) {
    constexpr int count = Columns / 2;
    int part = thread / 128, warp = thread / 32 % 4, lane = thread % 32;
    const float4* sums = reinterpret_cast<const float4*>(p.dq_sums + block * Config::kSumFloats +
                                                         part * Config::kFirstColumns * 64) +
                         warp * count * 8 + lane;
#pragma unroll
    for (int j = 0; j < count / 4; ++j) {
      float4 y = __ldcs(sums + j * 32);
      x[4 * j] = y.x, x[4 * j + 1] = y.y, x[4 * j + 2] = y.z, x[4 * j + 3] = y.w;
    }
  }

  template <int Columns>
  FA3_DEVICE static void keep(const auto& p, const float (&x)[Columns / 2], int queries,
                              int query_block, int head, int batch, int thread) {
    int part = thread / 128, warp = thread / 32 % 4, lane = thread % 32;
    int q0 = query_block * Config::kBlockM + Config::sum_row(part) + warp * 16 + lane / 4;
    int column = Config::sum_column(part);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int q = q0 + 8 * r;
      char* to = p.dq + 2 * (p.dq_at.at(batch, head, q) + column);
      store_row<Dtype, Columns, Config::kBeside>(x, r, Variant::kFactor, q < queries, to,
                                                 Config::kDimQK - column);
    }
  }
};

struct NanValuesParams {
  const float* lse;
  char* dv;
  RowStrides dv_at;
  int64_t rows;  // that share a KV head
  int keys, columns;
};

// dV where a row has nothing but scores of -inf: its weights are NaN for every key, those of blocks
// that no query reads included.
struct NanValues {
  using Params = NanValuesParams;
  static constexpr int kThreads = 512;

  // Grid (1, KV heads, batches).
  FA3_DEVICE static void run(const Params& p) {
    const float* lse = p.lse + (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * p.rows;
    bool lost = false;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < p.rows; i += kThreads) lost |= __ldg(lse + i) == -inf();
    if (!__syncthreads_or(lost)) return;
    int64_t elements = static_cast<int64_t>(p.keys) * p.columns;
    for (int64_t i = threadIdx.x; i < elements; i += kThreads) {
      int64_t at = p.dv_at.at(blockIdx.z, blockIdx.y, i / p.columns) + i % p.columns;
      reinterpret_cast<unsigned short*>(p.dv)[at] = 0x7fff;  // in bfloat16 and float16 alike
    }
  }
};

}  // namespace fa3
