// A tile of Q, K, V or dO in shared memory, as TMA writes it and wgmma reads it.
#pragma once
#include "fa3/tma.cuh"
#include "fa3/wgmma.cuh"

namespace fa3 {

// One operand tile: panels of 64 columns (128-byte swizzle), or of 32 where that wastes less.
template <int Dim, int Rows>
struct OperandTile {
  static constexpr int kWidth = round_up(Dim, 32);
  static constexpr int kSwizzle = kWidth % 64 == 0 ? 128 : 64;
  static constexpr int kPanelColumns = kSwizzle / 2;
  static constexpr int kPanels = kWidth / kPanelColumns;
  static constexpr int kPanelBytes = Rows * kSwizzle;
  static constexpr int kBytes = kPanels * kPanelBytes;
  using Desc = Descriptor<kSwizzle>;

  FA3_DEVICE static void load(uint32_t dst, const TensorMap& map, uint32_t barrier,
                              uint64_t policy, int row, int head, int batch) {
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
      tma_load(dst + i * kPanelBytes, map, barrier, policy, i * kPanelColumns, row, head, batch);
  }
};

}  // namespace fa3
