// Attention forward on Hopper, after FlashAttention-3 (Shah et al. 2024): one producer warpgroup
// loads by TMA, one to three consumer warpgroups of 64 query rows each multiply and normalise.
// Thread blocks are persistent: each works through tiles until none is left.
#pragma once
#include "sm90/forward_consumer.cuh"
#include "sm90/forward_producer.cuh"

namespace fa3 {

template <class Config, class Variant>
struct AttentionForward {
  using Block = ForwardBlock<Config, Variant>;
  using Params = typename Block::Params;
  static constexpr int kSharedBytes = Block::kSharedBytes;

  FA3_DEVICE static void run(const Params& p) {
    extern __shared__ char memory[];
    Block block{p, (shared_address(memory) + 1023) & ~1023u};
    if (threadIdx.x == 0) block.init_barriers();
    if constexpr (Config::kPacked) block.clear_queries();
    __syncthreads();
    if (threadIdx.x < 128) {
      shrink_registers<Config::kProducerRegisters>();
      if (threadIdx.x == 0) ForwardProducer<Config, Variant>{block}.run();
    } else {
      grow_registers<Config::kConsumerRegisters>();
      ForwardConsumer<Config, Variant>{block}.run();
    }
  }
};

}  // namespace fa3
