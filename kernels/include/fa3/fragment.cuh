// Accumulators of wgmma m64nN on their way to memory. A thread holds two rows, eight apart, and in
// each the columns 8j + 2 * (lane % 4) + {0, 1}; element [4j + 2r + e].
#pragma once
#include "fa3/ptx.cuh"

namespace fa3 {

// Once: it is not read again soon, and need not stay in L2.
template <bool Once = false>
FA3_DEVICE void store_if(bool wanted, char* to, const uint32_t (&x)[4]) {
  if constexpr (Once) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.cs.v4.b32 [%1], {%2, %3, %4, %5};}" ::"r"(
            static_cast<int>(wanted)),
        "l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
        : "memory");
    return;
  }
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5};}" ::"r"(
          static_cast<int>(wanted)),
      "l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
      : "memory");
}

// x[i] of lane l becomes x[l] of lane i, for the four lanes that are `stride` apart; `lane` is this
// one's place among them.
FA3_DEVICE void lane_transpose(uint32_t (&x)[4], int lane, int stride) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      uint32_t sent = upper ? x[i] : x[i | bit];
      uint32_t received = __shfl_xor_sync(~0u, sent, bit * stride);
      if (upper) x[i] = received;
      else x[i | bit] = received;
    }
  }
}

// Columns 0 .. Columns - 1 of row r (0 or 1) of this thread, those before `end`, times `factor`, at
// `to`: lanes of a quad exchange pieces so that each writes 16 bytes. All lanes take part, `inside`
// or not.
template <class Dtype, int Columns, bool Once = false, int N>
FA3_DEVICE void store_row(const float (&x)[N], int r, float factor, bool inside, char* to,
                          int end = Columns) {
  constexpr int pieces = Columns / 8;
  int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < pieces; j += 4) {
    uint32_t y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int at = j + i < pieces ? 4 * (j + i) + 2 * r : 0;
      y[i] = pack<Dtype>(x[at] * factor, x[at + 1] * factor);
    }
    lane_transpose(y, quad_lane, 1);
    store_if<Once>(inside && j + quad_lane < pieces && 8 * (j + quad_lane) < end,
                   to + 16 * (j + quad_lane), y);
  }
}

FA3_DEVICE void load_shared(float* x, uint32_t from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(from));
}

FA3_DEVICE float2 load_pair(uint32_t from) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from));
  return x;
}

FA3_DEVICE void store_shared(uint32_t to, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

FA3_DEVICE void set_shared(uint32_t to, int x) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
FA3_DEVICE int get_shared(uint32_t from) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}

FA3_DEVICE void store_words(uint32_t to, const uint32_t* x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}
FA3_DEVICE void load_words(uint32_t* x, uint32_t from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

// Four 8x8 tiles of packed accumulators, transposed: lane l says where column l % 8 of tile l / 8
// goes as a row.
FA3_DEVICE void store_transposed(uint32_t row, const uint32_t* x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// The inverse.
FA3_DEVICE void load_transposed(uint32_t* x, uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row));
}

// Four 8x8 tiles of 16 bits: lane l says where row l % 8 of tile l / 8 begins, and gets of each tile
// what an accumulator has of it: of row l / 4 the columns 2 * (l % 4) + {0, 1}.
FA3_DEVICE void load_tiles(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row));
}

// With an L2 eviction policy.
FA3_DEVICE void add_global(float* to, float a, float b, float c, float d, uint64_t policy) {
  asm volatile("red.global.add.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(a),
               "f"(b), "f"(c), "f"(d), "l"(policy)
               : "memory");
}

// What is in these 128 bytes is lost: from L2 it need not go to memory.
FA3_DEVICE void discard(const float* line) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}

FA3_DEVICE void add_global(float* to, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

}  // namespace fa3
