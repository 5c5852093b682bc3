// Ping-pong between consumer warpgroups: they take turns to issue their matrix products, so that
// one computes its softmax while another's products run (FlashAttention-3, section 3.1).
#pragma once
#include "fa3/ptx.cuh"

namespace fa3 {

template <int Warpgroups, bool Enabled>
struct PingPong {
  static constexpr int kThreads = 256;  // the 128 that wait and the 128 that let them go
  static constexpr int kFirst = 1;      // barrier 0 belongs to __syncthreads

  FA3_DEVICE static void arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
  }
  // Warpgroup 0 has the first turn; it lets itself in.
  FA3_DEVICE static void start(int warpgroup) {
    if (Enabled && Warpgroups > 1 && warpgroup == 0) arrive(kFirst);
  }
  FA3_DEVICE static void wait(int warpgroup) {
    if (Enabled && Warpgroups > 1)
      asm volatile("bar.sync %0, %1;" ::"r"(kFirst + warpgroup), "n"(kThreads) : "memory");
  }
  FA3_DEVICE static void pass(int warpgroup) {
    if (Enabled && Warpgroups > 1)
      arrive(kFirst + (warpgroup + 1 == Warpgroups ? 0 : warpgroup + 1));
  }
};

}  // namespace fa3
