// Elements of captured tensors, and integer arithmetic on them: int, or 64 bits where a tensor is.
#pragma once
#include "fa3/ptx.cuh"

namespace fa3 {

// One element of global memory, through the read-only path.
template <class T>
FA3_DEVICE T ldg(const T* p) { return __ldg(p); }

template <class Dtype>
FA3_DEVICE float ldg_half(const void* p) {
  unsigned short bits;
  asm("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(p));
  return unpack<Dtype>(bits).x;
}
FA3_DEVICE float ldg(const Bf16* p) { return ldg_half<Bf16>(p); }
FA3_DEVICE float ldg(const Fp16* p) { return ldg_half<Fp16>(p); }

// min and max of CUDA are ambiguous where one operand has 64 bits.
template <class A, class B>
FA3_DEVICE auto least(A a, B b) { return a < b ? a : b; }
template <class A, class B>
FA3_DEVICE auto largest(A a, B b) { return a < b ? b : a; }
template <class A>
FA3_DEVICE A magnitude(A a) { return a < 0 ? -a : a; }

// Rounded towards minus infinity, for b > 0.
FA3_DEVICE int64_t floor_div(int64_t a, int64_t b) { return (a < 0 ? a - b + 1 : a) / b; }

// log(exp(a) + exp(b)), for several sinks of a row.
FA3_DEVICE float log_add(float a, float b) {
  float top = fmaxf(a, b);
  if (top == -inf()) return top;
  return top + kLn2 * log2_approx(exp2_approx((a - top) * kLog2e) +
                                  exp2_approx((b - top) * kLog2e));
}

}  // namespace fa3
