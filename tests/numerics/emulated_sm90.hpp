// What the Hopper kernels use of CUDA, on the CPU: a fiber for each of a block's threads, warps and
// warpgroups as barriers, shared memory as an array, and the tensor cores, the copy engine and
// mbarriers as their documentation has them. Blocks run one after the other, and of the fibers one
// at a time, in another order in each round.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

struct int2 { int x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { unsigned x, y, z, w; };
struct dim3_ { unsigned x, y, z; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulated {
inline unsigned thread;

// The threads of a block. One that waits lets the others run; where all of them wait, that is an
// error.
struct Fibers {
  static constexpr size_t kStack = 1 << 18;
  std::vector<ucontext_t> contexts;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<bool> done;
  ucontext_t scheduler;
  std::function<void()> body;
  bool moved;  // somebody did more than wait

  void run(int threads, std::function<void()> what);
  void leave() { swapcontext(&contexts[thread], &scheduler); }
};
inline Fibers* fibers;

inline void enter() {
  fibers->body();
  fibers->done[thread] = fibers->moved = true;
}

inline void Fibers::run(int threads, std::function<void()> what) {
  body = std::move(what);
  contexts.resize(threads), stacks.resize(threads), done.assign(threads, false);
  fibers = this;
  for (int t = 0; t < threads; ++t) {
    stacks[t].reset(new char[kStack]);
    getcontext(&contexts[t]);
    contexts[t].uc_stack.ss_sp = stacks[t].get();
    contexts[t].uc_stack.ss_size = kStack;
    contexts[t].uc_link = &scheduler;
    makecontext(&contexts[t], enter, 0);
  }
  std::vector<int> left(threads);
  for (int t = 0; t < threads; ++t) left[t] = t;
  std::minstd_rand random;
  while (!left.empty()) {
    moved = false;
    for (int t : left) {
      thread = t;
      swapcontext(&scheduler, &contexts[t]);
    }
    left.erase(std::remove_if(left.begin(), left.end(), [&](int t) { return done[t]; }),
               left.end());
    if (!moved) std::printf("every thread waits\n"), std::abort();
    std::shuffle(left.begin(), left.end(), random);
  }
}

template <class F> void wait_until(F condition) {
  while (!condition()) fibers->leave();
  fibers->moved = true;
}

struct Gate {
  explicit Gate(int threads) : threads(threads) {}
  int threads, arrived = 0;
  unsigned turn = 0;
  void arrive_and_wait() {
    unsigned mine = turn;
    if (++arrived == threads) arrived = 0, ++turn;
    wait_until([&] { return turn != mine; });
  }
};

struct Warp {
  Gate gate{32};
  unsigned long long slots[32];
};
struct Pending { int arrivals, count; long long bytes; int phase; };
struct Block {
  explicit Block(int threads) : gate(threads), warps(threads / 32), groups((threads + 127) / 128) {
    for (auto& x : warps) x = std::make_unique<Warp>();
    for (auto& x : groups) x = std::make_unique<Gate>(threads < 128 ? threads : 128);
  }
  Gate gate;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Gate>> groups;
  std::map<unsigned, Pending> barriers;
  unsigned registers[512][4];  // A operands on their way to other lanes
  int ors = 0;
};
inline Block* block;
inline char memory_base[1 << 18];
inline dim3_ block_at, grid_of;
inline Warp& warp() { return *block->warps[thread / 32]; }

template <class F>
unsigned long long exchange(unsigned long long mine, F from) {
  Warp& w = warp();
  w.slots[thread % 32] = mine;
  w.gate.arrive_and_wait();
  unsigned long long got = from(w.slots);
  w.gate.arrive_and_wait();
  return got;
}
struct ThreadIdx { operator dim3_() const { return {thread, 0, 0}; } };
}  // namespace emulated

#define threadIdx (dim3_{emulated::thread, 0, 0})
#define blockIdx emulated::block_at
#define gridDim emulated::grid_of
#define __device__
#define __shared__ static
#define __global__
#define __restrict__
#define FA3_DEVICE inline

inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
inline void __syncthreads() { emulated::block->gate.arrive_and_wait(); }
inline int __syncthreads_or(int x) {
  if (x) emulated::block->ors = 1;
  __syncthreads();
  int any = emulated::block->ors;
  __syncthreads();
  emulated::block->ors = 0;
  __syncthreads();
  return any;
}
inline void __syncwarp() { emulated::warp().gate.arrive_and_wait(); }
template <class T> T shuffle(T x, int from) {
  unsigned long long bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = emulated::exchange(bits, [&](auto& s) { return s[from]; });
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T> T __shfl_sync(unsigned, T x, int from) { return shuffle(x, from); }
template <class T> T __shfl_xor_sync(unsigned, T x, int bits) {
  return shuffle(x, emulated::thread % 32 ^ bits);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return emulated::exchange(x, [](auto& s) {
    unsigned long long all = 0;
    for (int i = 0; i < 32; ++i) all |= (s[i] & 1) << i;
    return all;
  });
}
inline unsigned __activemask() { return ~0u; }
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == ~0u; }
inline int reduced(int x, bool least) {
  return static_cast<int>(emulated::exchange(static_cast<unsigned>(x), [&](auto& s) {
    int y = static_cast<int>(s[0]);
    for (int i = 1; i < 32; ++i) {
      int z = static_cast<int>(s[i]);
      y = least == (z < y) ? z : y;
    }
    return static_cast<unsigned long long>(static_cast<unsigned>(y));
  }));
}
inline int __reduce_min_sync(unsigned, int x) { return reduced(x, true); }
inline int __reduce_max_sync(unsigned, int x) { return reduced(x, false); }
inline int atomicAdd(int* p, int x) {
  int old = *p;
  *p += x;
  return old;
}

namespace fa3 {
using uint32_t = unsigned;
using uint64_t = unsigned long long;
using int64_t = long long;
struct Bf16 { unsigned short bits; };
struct Fp16 { unsigned short bits; };
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
inline float inf() { return __int_as_float(0x7f800000); }
inline float nan() { return __int_as_float(0x7fc00000); }
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float tanh_approx(float x) { return std::tanh(x); }
inline float sigmoid_approx(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float max_nan(float x, float y) { return x != x || y != y ? x + y : std::fmax(x, y); }
inline float min_nan(float x, float y) { return x != x || y != y ? x + y : std::fmin(x, y); }
template <class D> float value_of(unsigned short);
template <> inline float value_of<Bf16>(unsigned short x) { return __int_as_float(x << 16); }
template <> inline float value_of<Fp16>(unsigned short x) {
  _Float16 y; std::memcpy(&y, &x, 2); return float(y);
}
template <class D> unsigned short bits_of(float);
template <> inline unsigned short bits_of<Bf16>(float x) {
  unsigned y; std::memcpy(&y, &x, 4);
  if (x != x) return 0x7fc0;
  return (y + 0x7fff + (y >> 16 & 1)) >> 16;
}
template <> inline unsigned short bits_of<Fp16>(float x) {
  _Float16 y = static_cast<_Float16>(x); unsigned short z; std::memcpy(&z, &y, 2); return z;
}
template <class D> uint32_t pack(float lo, float hi) {
  return bits_of<D>(lo) | static_cast<uint32_t>(bits_of<D>(hi)) << 16;
}
template <class D> float2 unpack(uint32_t x) {
  return {value_of<D>(x & 0xffff), value_of<D>(x >> 16)};
}
inline uint32_t shared_address(const void*) { return 1024; }
template <int> void grow_registers() {}
template <int> void shrink_registers() {}
inline void forget(int64_t&) {}
inline void forget(int&) {}
inline void fence_proxy_async() {}
template <class T> T& at_shared(uint32_t a) {
  return *reinterpret_cast<T*>(emulated::memory_base + a);
}

// ---- captured.cuh ----
template <class T> T ldg(const T* p) { return *p; }
inline float ldg(const Bf16* p) { return value_of<Bf16>(p->bits); }
inline float ldg(const Fp16* p) { return value_of<Fp16>(p->bits); }

// ---- mbarrier.cuh ----
inline void settle(emulated::Pending& x) {
  if (x.arrivals == 0 && x.bytes == 0) {
    x.arrivals = x.count, x.phase ^= 1;
  }
}
inline void mbarrier_init(uint32_t b, int n) { emulated::block->barriers[b] = {n, n, 0, 0}; }
inline void mbarrier_init_fence() {}
inline void mbarrier_change(uint32_t b, int arrivals, long long bytes) {
  auto& x = emulated::block->barriers.at(b);
  x.arrivals -= arrivals;
  x.bytes += bytes;
  if (x.arrivals < 0) std::printf("too many arrivals\n"), std::abort();
  settle(x);
}
inline void mbarrier_arrive(uint32_t b) { mbarrier_change(b, 1, 0); }
inline void mbarrier_expect(uint32_t b, int bytes) { mbarrier_change(b, 1, bytes); }
inline void mbarrier_wait(uint32_t b, uint32_t parity) {
  auto& x = emulated::block->barriers.at(b);
  emulated::wait_until([&] { return x.phase != static_cast<int>(parity); });
}
template <int Stages> struct PipelineState {
  uint32_t passed = 0;
  uint32_t stage() const { return passed % Stages; }
  uint32_t parity() const { return passed / Stages & 1; }
  void advance() { ++passed; }
};

// ---- tma.cuh: a map is {address, four sizes, four strides, box rows, box columns, element bytes} ----
struct alignas(64) TensorMap {
  char* base;
  int sizes[4];      // d, sequence, head, batch
  int64_t strides[4];
  int rows, columns, bytes;
  char rest[60];
};
constexpr uint64_t kEvictFirst = 0, kEvictLast = 0;
inline uint32_t swizzled(uint32_t a, int row_bytes) {
  return a ^ (a >> 3 & (row_bytes == 128 ? 0x70 : row_bytes == 64 ? 0x30 : 0x10));
}
template <class F>
void over_box(const TensorMap& m, uint32_t at, int d, int row, int head, int batch, F f) {
  for (int r = 0; r < m.rows; ++r)
    for (int c = 0; c < m.columns; ++c) {
      bool inside = d + c < m.sizes[0] && row + r < m.sizes[1] && head < m.sizes[2] &&
                    batch < m.sizes[3];
      int64_t e = (d + c) * m.strides[0] + (row + r) * m.strides[1] + head * m.strides[2] +
                  batch * m.strides[3];
      uint32_t to = swizzled(at + (r * m.columns + c) * m.bytes, m.columns * m.bytes);
      f(to, inside ? m.base + e * m.bytes : nullptr);
    }
}
inline void tma_prefetch(const TensorMap&) {}
inline void tma_load(uint32_t dst, const TensorMap& m, uint32_t barrier, uint64_t, int d, int row,
                     int head, int batch) {
  over_box(m, dst, d, row, head, batch, [&](uint32_t to, const char* from) {
    std::memset(emulated::memory_base + to, 0, m.bytes);
    if (from) std::memcpy(emulated::memory_base + to, from, m.bytes);
  });
  mbarrier_change(barrier, 0, -1ll * m.bytes * m.rows * m.columns);
}
inline void bulk_load(uint32_t dst, const void* from, int bytes, uint32_t barrier) {
  std::memcpy(emulated::memory_base + dst, from, bytes);
  mbarrier_change(barrier, 0, -bytes);
}
using StoreDtype = DTYPE;
template <bool Add>
void tma_store(const TensorMap& m, uint32_t from, int d, int row, int head, int batch) {
  over_box(m, from, d, row, head, batch, [](uint32_t at, char* cell) {
    if (!cell) return;
    auto* to = reinterpret_cast<unsigned short*>(cell);
    unsigned short x = at_shared<unsigned short>(at);
    *to = Add ? bits_of<StoreDtype>(value_of<StoreDtype>(x) + value_of<StoreDtype>(*to)) : x;
  });
}
inline void bulk_commit() {}
inline void bulk_wait_read() {}
inline void bulk_wait() {}

// ---- wgmma.cuh ----
template <int SwizzleBytes> struct Descriptor {
  static constexpr uint64_t kHigh = (SwizzleBytes * 8 / 16) | (SwizzleBytes == 128 ? 1u << 30 : 2u << 30);
  static uint32_t low(uint32_t a, int panel) { return (a >> 4) | (uint32_t(panel >> 4) << 16); }
  static uint64_t make(uint32_t low) { return (kHigh << 32) | low; }
};
struct Operand {
  uint32_t start, leading, stride;
  int row_bytes;
  explicit Operand(uint64_t d)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4), row_bytes(d >> 62 == 1 ? 128 : 64) {}
  // Contiguous along the reduced axis: rows are m or n.
  uint32_t inner(int row, int k) const {
    return swizzled(start + row / 8 * stride + row % 8 * row_bytes + 2 * k, row_bytes);
  }
  // Contiguous along n: rows are k.
  uint32_t outer(int n, int k) const {
    int width = row_bytes / 2;
    return swizzled(start + n / width * leading + k / 8 * stride + k % 8 * row_bytes +
                        2 * (n % width), row_bytes);
  }
};
inline emulated::Gate& warpgroup() { return *emulated::block->groups[emulated::thread / 128]; }
template <class D, int N> struct Wgmma {
  template <class A, class B>
  static void multiply(float (&d)[N / 2], A a, B b, bool add) {
    int lane = emulated::thread % 32, row0 = emulated::thread % 128 / 32 * 16 + lane / 4;
    for (int i = 0; i < N / 2; ++i) {
      int row = row0 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float x = add ? d[i] : 0.0f;
      for (int k = 0; k < 16; ++k) x += a(row, k) * b(column, k);
      d[i] = x;
    }
  }
  static float at(uint32_t a) { return value_of<D>(at_shared<unsigned short>(a)); }
  static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
    Operand x(a), y(b);
    warpgroup().arrive_and_wait();
    multiply(d, [&](int m, int k) { return at(x.inner(m, k)); },
             [&](int n, int k) { return at(y.inner(n, k)); }, add);
    warpgroup().arrive_and_wait();
  }
  static void st(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
    Operand x(a), y(b);
    warpgroup().arrive_and_wait();
    multiply(d, [&](int m, int k) { return at(x.inner(m, k)); },
             [&](int n, int k) { return at(y.outer(n, k)); }, add);
    warpgroup().arrive_and_wait();
  }
  static void held(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                   uint64_t b, int add) {
    Operand y(b);
    product(d, a0, a1, a2, a3, [&](int n, int k) { return at(y.inner(n, k)); }, add);
  }
  static void rs(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                 uint64_t b) {
    Operand y(b);
    product(d, a0, a1, a2, a3, [&](int n, int k) { return at(y.outer(n, k)); }, true);
  }
  template <class B>
  static void product(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, B b,
                      bool add) {
    auto& own = emulated::block->registers[emulated::thread];
    own[0] = a0, own[1] = a1, own[2] = a2, own[3] = a3;
    warpgroup().arrive_and_wait();
    unsigned first = emulated::thread / 128 * 128;
    multiply(d, [&](int m, int k) {
      auto& r = emulated::block->registers[first + m / 16 * 32 + m % 8 * 4 + k % 8 / 2];
      uint32_t pair = r[k / 8 * 2 + m % 16 / 8];
      return value_of<D>(k & 1 ? pair >> 16 : pair & 0xffff);
    }, b, add);
    warpgroup().arrive_and_wait();
  }
};
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int> void wgmma_wait() {}
template <int N> void wgmma_pin(float (&)[N]) {}
template <int N> void wgmma_hold(const uint32_t (&)[N]) {}

// ---- fragment.cuh ----
template <bool Once = false>
void store_if(bool wanted, char* to, const uint32_t (&x)[4]) {
  if (wanted) std::memcpy(to, x, 16);
}
inline void set_shared(uint32_t a, int x) { at_shared<int>(a) = x; }
inline int get_shared(uint32_t a) { return at_shared<int>(a); }
inline void store_words(uint32_t a, const uint32_t* x) {
  std::memcpy(emulated::memory_base + a, x, 16);
}
inline void load_words(uint32_t* x, uint32_t a) { std::memcpy(x, emulated::memory_base + a, 16); }
inline void load_shared(float* x, uint32_t a) { std::memcpy(x, emulated::memory_base + a, 16); }
// ldmatrix and stmatrix with .trans: lane l gives the row of tile l / 8; a lane's register i holds
// of tile i the elements (2 * (l % 4) + {0, 1}, l / 4).
inline void turned(uint32_t row, uint32_t* x, bool load) {
  for (int i = 0; i < 4; ++i) {
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e) {
      int lane = emulated::thread % 32;
      uint32_t address = shuffle(row, 8 * i + lane % 4 * 2 + e) + lane / 4 * 2;
      auto& cell = at_shared<unsigned short>(address);
      if (load) pair |= static_cast<uint32_t>(cell) << 16 * e;
      else cell = x[i] >> 16 * e & 0xffff;
    }
    if (load) x[i] = pair;
  }
  __syncwarp();
}
inline void store_transposed(uint32_t row, const uint32_t* x) {
  turned(row, const_cast<uint32_t*>(x), false);
}
inline void load_transposed(uint32_t* x, uint32_t row) { turned(row, x, true); }
inline float2 load_pair(uint32_t from) { return at_shared<float2>(from); }
inline void load_tiles(uint32_t (&x)[4], uint32_t row) {
  int lane = emulated::thread % 32;
  for (int i = 0; i < 4; ++i)
    x[i] = at_shared<uint32_t>(shuffle(row, 8 * i + lane / 4) + lane % 4 * 4);
}
inline void discard(const float* line) {
  const_cast<float*>(line)[0] = const_cast<float*>(line)[31] = nan();
}
inline void add_global(float* to, float a, float b, float c, float d, uint64_t = 0) {
  to[0] += a, to[1] += b, to[2] += c, to[3] += d;
}

// ---- progress.cuh ----
inline void signal(int* counter) { atomicAdd(counter, 1); }
inline void fence_gpu() {}
inline void count(int* counter) { atomicAdd(counter, 1); }
inline void fence_proxy_async_global() {}
inline void await(int* counter, int count) {
  emulated::wait_until([&] { return *counter >= count; });
}
}  // namespace fa3

template <class Kernel, class Params>
void launch(const void* params, unsigned x, unsigned y, unsigned z, int threads) {
  Params aligned;
  std::memcpy(static_cast<void*>(&aligned), params, sizeof aligned);
  emulated::grid_of = {x, y, z};
  for (unsigned k = 0; k < z; ++k)
    for (unsigned j = 0; j < y; ++j)
      for (unsigned i = 0; i < x; ++i) {
        emulated::Block own(threads);
        emulated::block = &own;
        emulated::block_at = {i, j, k};
        // Whatever was in shared memory may be there: NaN.
        std::memset(emulated::memory_base, 0xff, sizeof emulated::memory_base);
        emulated::Fibers().run(threads, [&] { Kernel::run(aligned); });
      }
}
