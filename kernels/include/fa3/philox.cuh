// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section
// 4.3), and `uniform` of the expressions: word kv % 4 of the counter (kv / 4, q, h, b).
#pragma once
#include "fa3/ptx.cuh"

namespace fa3 {

struct RandomWords {
  uint32_t word[4];
};

// The keys of all rounds. Held in registers: recomputing them would be a sixth of a call.
struct RandomKeys {
  uint32_t low[10], high[10];

  FA3_DEVICE explicit RandomKeys(int64_t seed) {
    low[0] = static_cast<uint32_t>(seed);
    high[0] = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 1; round < 10; ++round) {
      low[round] = low[round - 1] + 0x9E3779B9u;
      high[round] = high[round - 1] + 0xBB67AE85u;
    }
  }

  FA3_DEVICE void hold() {
#pragma unroll
    for (int round = 0; round < 10; ++round)
      asm volatile("" : "+r"(low[round]), "+r"(high[round]));
  }
};

FA3_DEVICE RandomWords philox(const RandomKeys& keys, int b, int h, int q, int kv_group) {
  uint32_t c0 = kv_group, c1 = q, c2 = h, c3 = b;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    uint64_t x = static_cast<uint64_t>(c0) * 0xD2511F53u;
    uint64_t y = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(y >> 32) ^ c1 ^ keys.low[round];
    c1 = static_cast<uint32_t>(y);
    c2 = static_cast<uint32_t>(x >> 32) ^ c3 ^ keys.high[round];
    c3 = static_cast<uint32_t>(x);
  }
  return {{c0, c1, c2, c3}};
}

FA3_DEVICE RandomWords philox(int64_t seed, int b, int h, int q, int kv_group) {
  return philox(RandomKeys(seed), b, h, q, kv_group);
}

// The upper 24 bits, in [0, 1).
FA3_DEVICE float unit_interval(uint32_t word) {
  return static_cast<float>(word >> 8) * (1.0f / 16777216.0f);
}

// A number by its word: against a constant, dropout's probability, it is compared as an integer.
struct Uniform {
  uint32_t word;

  FA3_DEVICE operator float() const { return unit_interval(word); }
  FA3_DEVICE friend bool operator<(Uniform x, float p) {
    float steps = ceilf(p * 16777216.0f);
    if (!(steps > 0.0f)) return false;
    return steps >= 16777216.0f || x.word < static_cast<uint32_t>(steps) << 8;
  }
};

FA3_DEVICE Uniform uniform(int64_t seed, int b, int h, int q, int kv) {
  RandomWords words = philox(seed, b, h, q, kv / 4);
  uint32_t low = kv & 1 ? words.word[1] : words.word[0];
  uint32_t high = kv & 1 ? words.word[3] : words.word[2];
  return {kv & 2 ? high : low};
}

}  // namespace fa3
