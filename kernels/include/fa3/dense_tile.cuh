// A tile of the dense (q, kv) input in shared memory, as TMA writes it beside the keys, and the
// elements of it that belong to a thread's accumulators (fragment.cuh).
#pragma once
#include "fa3/fragment.cuh"
#include "fa3/tma.cuh"

namespace fa3 {

// Panels of 128 bytes a row (128-byte swizzle), then, of 16 bits, of 16 columns.
template <class Dtype, int Rows, int Columns>
struct DenseTile {
  static constexpr int kElement = sizeof(Dtype), kBytes = kElement * Rows * Columns;
  static constexpr int kPanelColumns = 128 / kElement, kPanelBytes = 128 * Rows;
  static constexpr bool kWhole = Columns % kPanelColumns == 0;
  static constexpr int kMaps = kWhole ? 1 : 2;
  static_assert(kElement == 2 || kWhole, "float32 comes in panels of 32 columns");

  FA3_DEVICE static void load(uint32_t to, const TensorMap* maps, uint32_t barrier, int kv, int q,
                              int head, int batch) {
#pragma unroll
    for (int i = 0; i < Columns; i += i + kPanelColumns <= Columns ? kPanelColumns : 16)
      tma_load(to + i * Rows * kElement, maps[i + kPanelColumns <= Columns ? 0 : 1], barrier,
               kEvictFirst, kv + i, q, head, batch);
  }

  // A thread's elements, eight columns after the other, of the warp whose first row is `row`.
  struct Reader {
    uint32_t tile;
    int row;
    uint32_t pairs[4];   // of 16 bits: two rows in columns 8 j, and the same in columns 8 (j + 1)
    float2 later[2][2];  // of 32 bits: [j % 2][row] in columns 8 (j + 2)

    // In columns 8 j + 2 * (lane % 4) + {0, 1} of both rows; j = 0, 1, .. one after the other.
    FA3_DEVICE void take(int j, float2 (&x)[2]) {
      if constexpr (kElement == 2) {
        if (j % 2 == 0) take_pairs(j);
#pragma unroll
        for (int r = 0; r < 2; ++r) x[r] = unpack<Dtype>(pairs[j % 2 * 2 + r]);
      } else {
        take_words(j, x);
      }
    }

    FA3_DEVICE void take_pairs(int j) {
      int lane = threadIdx.x % 32, own = row + lane % 16;
      if (j / 8 < Columns / kPanelColumns) {
        uint32_t from = tile + own * 128 + (lane / 16 ^ lane % 8) * 16;  // swizzled, the same for all j
        load_tiles(pairs, (from ^ j % 8 * 16) + j / 8 * kPanelBytes);
      } else {
        int column = lane / 16 ^ lane / 4 % 2;
        load_tiles(pairs, tile + j * 8 * Rows * 2 + own * 32 + column * 16);
      }
    }

    // Swizzled, neighbouring rows have the same two words of 16 bytes in the same banks, so that odd
    // rows read columns 8 (j + 2) while even ones read columns 8 j, and the reverse.
    FA3_DEVICE void take_words(int j, float2 (&x)[2]) {
      int lane = threadIdx.x % 32, own = lane / 4;
      bool odd = own % 2;
      if (j % 4 < 2) {
        uint32_t from = tile + (row + own) * 128 + (lane % 4 / 2 ^ own ^ (odd ? 4 : 0)) * 16 +
                        lane % 2 * 8;
        from = (from ^ j % 4 * 32) + j / 4 * kPanelBytes;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float2 first = load_pair(from + r * 8 * 128), second = load_pair((from ^ 64) + r * 8 * 128);
          x[r] = odd ? second : first;
          later[j % 2][r] = odd ? first : second;
        }
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) x[r] = later[j % 2][r];
      }
    }
  };
};

}  // namespace fa3
