// Scalar PTX used by every Hopper kernel: fixed-width names, approximate math, packing, registers.
// NVRTC compiles this without any CUDA header, which keeps a cold build near half a second.
#pragma once

namespace fa3 {

using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;

// Storage of 16 bits each, so that pointers count elements.
struct Bf16 { unsigned short bits; };
struct Fp16 { unsigned short bits; };

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

#define FA3_DEVICE __device__ __forceinline__

FA3_DEVICE float inf() { return __int_as_float(0x7f800000); }
FA3_DEVICE float nan() { return __int_as_float(0x7fc00000); }

constexpr __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr __device__ int round_up(int a, int b) { return (a + b - 1) / b * b; }

FA3_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FA3_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Relative error 2^-11 by PTX's word, 1.2e-5 on an H100: too coarse for fp32 inputs.
FA3_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / (1 + e^-x), whose small values keep their digits.
FA3_DEVICE float sigmoid_approx(float x) {
  return __fdividef(1.0f, 1.0f + exp2_approx(-kLog2e * x));
}

// Of NaN they are NaN, as in torch; fmaxf and fminf are the other number.
FA3_DEVICE float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

FA3_DEVICE float min_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

template <class Dtype>
FA3_DEVICE uint32_t pack(float lo, float hi);

template <>
FA3_DEVICE uint32_t pack<Bf16>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

template <>
FA3_DEVICE uint32_t pack<Fp16>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

template <class Dtype>
FA3_DEVICE float2 unpack(uint32_t x);

template <>
FA3_DEVICE float2 unpack<Bf16>(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}

template <>
FA3_DEVICE float2 unpack<Fp16>(uint32_t x) {
  float2 y;
  asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(y.x), "=f"(y.y) : "r"(x));
  return y;
}

// Whatever was computed from x is computed anew from here on.
FA3_DEVICE void forget(int64_t& x) { asm volatile("" : "+l"(x)); }
FA3_DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }

// Shared memory written by ordinary stores is seen by TMA and wgmma, after a barrier.
FA3_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

FA3_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <int Registers>
FA3_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
FA3_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace fa3
