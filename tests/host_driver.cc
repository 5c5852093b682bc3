// libcuda.so.1 on a machine without a GPU: what cuda-bindings and Triton ask of the CUDA driver,
// with the driver's own refusals. Device memory is the host's; streams are numbers, their device's
// what is above 16 bits. A "cubin" is the path of a shared library, and a launch calls its function
// of that name; any other cubin's kernels do nothing. Built and loaded by host_driver.py.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {
enum Result { kSuccess = 0, kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201,
              kInvalidHandle = 400, kNotFound = 500, kCaptureUnsupported = 900 };
enum CaptureMode { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };
enum FunctionAttribute { kMaxThreads = 0, kRegisters = 4, kMaxDynamicShared = 8,
                         kLastAttribute = 15 };
enum DeviceAttribute { kMaxSharedPerBlock = 8, kWarpSize = 10, kMaxRegisters = 12, kClockRate = 13,
                       kProcessors = 16, kMemoryClock = 36, kBusWidth = 37, kMajor = 75,
                       kMaxSharedPerProcessor = 81, kMaxSharedOptin = 97 };
constexpr unsigned kLargestShared = 232448, kSharedWithoutAsking = 49152;
constexpr int kDevices = 2;

// Of a launch that host_driver.py asks for.
struct Launched {
  const char* name;
  unsigned grid[3], threads, shared;
  std::uint64_t stream;
  int device;
};
// A device's primary one.
struct Context {
  int device;
};
// A kernel of a library: reads its parameter struct, and runs every block.
using Kernel = void (*)(const void* params, unsigned x, unsigned y, unsigned z, int threads);
struct Function {
  std::string name;
  Kernel run;
  const Context* context;
  unsigned dynamic_shared = kSharedWithoutAsking;
};
struct Module {
  void* library;  // none: any kernel is there, and does nothing
  const Context* context;
  std::map<std::string, Function> functions;
};

// A kernel of a graph. Its parameters are copied when they are given to it; here they stay where they
// are, so that a launch asks for new ones.
struct NodeValues {
  void* function;
  unsigned grid[3], block[3], shared;
  void** params;
  void** extra;
  void *kernel, *context;
};
struct Node {
  NodeValues values;
  bool given;
};
struct Graph {
  std::vector<Node*> nodes;
  const Context* context;
};

std::mutex lock;
std::set<Module*> modules;
std::set<void*> functions, allocated;
void (*observer)(const Launched*) = nullptr;

// Every thread begins without a context: no call of CUDA's runtime gives it one here.
thread_local const Context* current = nullptr;
const Context contexts[kDevices] = {{0}, {1}};

thread_local int capture_mode = kGlobal;
int graphs_launched = 0;
// Whether another thread is capturing a graph, in the mode that forbids most, and still can.
bool capturing = false, capture_valid = false;

// Of a call that a capture does not see: it ends those that the thread's mode lets it see.
Result unsafe() {
  if (!current) return kInvalidContext;
  if (!capturing || capture_mode != kGlobal) return kSuccess;
  capture_valid = false;
  return kCaptureUnsupported;
}

bool is_function(void* function) { return functions.count(function) != 0; }

Result launched(void* handle, const unsigned (&grid)[3], const unsigned (&block)[3],
                unsigned shared, void* stream, void** params, void** extra) {
  if (!current) return kInvalidContext;
  if (!is_function(handle) || params == nullptr || extra != nullptr) return kInvalidValue;
  auto* function = static_cast<Function*>(handle);
  auto number = reinterpret_cast<std::uint64_t>(stream);
  if (number >> 16 >= kDevices || (stream && &contexts[number >> 16] != current) ||
      function->context != current) {
    return kInvalidHandle;
  }
  std::uint64_t threads = std::uint64_t(block[0]) * block[1] * block[2];
  if (!threads || threads > 1024 || block[2] > 64 || shared > function->dynamic_shared) {
    return kInvalidValue;
  }
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffffu || grid[1] > 65535u ||
      grid[2] > 65535u) {
    return kInvalidValue;
  }
  if (observer) {
    Launched seen{function->name.c_str(), {grid[0], grid[1], grid[2]}, unsigned(threads), shared,
                  number, current->device};
    observer(&seen);
  }
  if (function->run) function->run(params[0], grid[0], grid[1], grid[2], int(threads));
  return kSuccess;
}
}  // namespace

extern "C" {
// For host_driver.py.

void host_driver_observe(void (*function)(const Launched*)) { observer = function; }
int host_driver_graphs_launched() { return graphs_launched; }
int host_driver_allocations() { return int(allocated.size()); }
void host_driver_begin_capture() { capturing = capture_valid = true; }
bool host_driver_end_capture() { capturing = false; return capture_valid; }

// The driver.

Result cuInit(unsigned) { return kSuccess; }
Result cuDriverGetVersion(int* version) { *version = 13000; return kSuccess; }
Result cuGetErrorString(Result, const char** text) { *text = "refused"; return kSuccess; }

Result cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < kDevices ? kSuccess : kInvalidDevice;
}
// None for CUDA's runtime, should PyTorch look for one.
Result cuDeviceGetCount(int* count) { *count = 0; return kSuccess; }
Result cuCtxGetCurrent(const Context** context) { *context = current; return kSuccess; }
Result cuCtxSetCurrent(const Context* context) { current = context; return kSuccess; }
Result cuCtxGetDevice(int* device) {
  if (!current) return kInvalidContext;
  *device = current->device;
  return kSuccess;
}
Result cuDevicePrimaryCtxRetain(const Context** context, int device) {
  if (device < 0 || device >= kDevices) return kInvalidDevice;
  *context = &contexts[device];
  return kSuccess;
}
Result cuCtxGetLimit(std::size_t* value, int) { *value = 0; return kSuccess; }
Result cuCtxSetLimit(int, std::size_t) { return kSuccess; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case kMaxSharedPerBlock: *value = kSharedWithoutAsking; break;
    case kWarpSize: *value = 32; break;
    case kMaxRegisters: *value = 65536; break;
    case kProcessors: *value = 132; break;
    case kMajor: *value = 9; break;
    case kMaxSharedPerProcessor: *value = kLargestShared + 1024; break;
    case kMaxSharedOptin: *value = kLargestShared; break;
    case kClockRate: case kMemoryClock: case kBusWidth: *value = 1; break;
    default: *value = 0;
  }
  return kSuccess;
}
Result cuStreamIsCapturing(void*, int* status) { *status = 0; return kSuccess; }

Result cuThreadExchangeStreamCaptureMode(int* mode) {
  if (*mode < kGlobal || *mode > kRelaxed) return kInvalidValue;
  std::swap(*mode, capture_mode);
  return kSuccess;
}

Result cuModuleLoadData(Module** module, const char* image) {
  if (Result refused = unsafe()) return refused;
  std::lock_guard hold(lock);
  if (image == nullptr) return kInvalidValue;
  void* library = image[0] == '/' ? dlopen(image, RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (image[0] == '/' && library == nullptr) return kInvalidValue;
  modules.insert(*module = new Module{library, current, {}});
  return kSuccess;
}
Result cuModuleUnload(Module* module) { return modules.count(module) ? kSuccess : kInvalidValue; }
Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
  std::lock_guard hold(lock);
  if (!modules.count(module)) return kInvalidValue;
  auto run = module->library ? reinterpret_cast<Kernel>(dlsym(module->library, name)) : nullptr;
  if (module->library && run == nullptr) return kNotFound;
  Function made{name, run, module->context};
  *function = &module->functions.try_emplace(name, made).first->second;
  functions.insert(*function);
  return kSuccess;
}
Result cuModuleGetGlobal_v2(void** address, std::size_t* bytes, Module* module, const char* name) {
  std::lock_guard hold(lock);
  if (!modules.count(module)) return kInvalidValue;
  void* found = module->library ? dlsym(module->library, name) : nullptr;
  if (found == nullptr) return kNotFound;
  if (address) *address = found;
  if (bytes) *bytes = 0;
  return kSuccess;
}
Result cuMemcpyDtoH_v2(void* to, const void* from, std::size_t bytes) {
  if (Result refused = unsafe()) return refused;
  std::memcpy(to, from, bytes);
  return kSuccess;
}
Result cuMemHostAlloc(void** address, std::size_t bytes, unsigned flags) {
  if (Result refused = unsafe()) return refused;
  if (address == nullptr || bytes == 0 || flags > 7) return kInvalidValue;
  *address = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return kSuccess;
}
Result cuMemAlloc_v2(void** address, std::size_t bytes) {
  if (Result refused = unsafe()) return refused;
  if (address == nullptr || bytes == 0) return kInvalidValue;
  bytes = (bytes + 255) / 256 * 256;
  *address = std::memset(std::aligned_alloc(256, bytes), 0xff, bytes);
  std::lock_guard hold(lock);
  allocated.insert(*address);
  return kSuccess;
}
Result cuMemFree_v2(void* address) {
  if (Result refused = unsafe()) return refused;
  std::lock_guard hold(lock);
  if (!allocated.erase(address)) return kInvalidValue;
  std::free(address);
  return kSuccess;
}
Result cuStreamSynchronize(void*) { return unsafe(); }
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  if (!is_function(function)) return kInvalidValue;
  *value = attribute == kMaxThreads ? 1024 : attribute == kRegisters ? 128 : 0;
  return kSuccess;
}
Result cuFuncSetAttribute(void* function, int attribute, int value) {
  if (!current) return kInvalidContext;
  if (!is_function(function) || attribute > kLastAttribute || value < 0) return kInvalidValue;
  if (attribute == kMaxDynamicShared) {
    if (unsigned(value) > kLargestShared) return kInvalidValue;
    static_cast<Function*>(function)->dynamic_shared = value;
  }
  return kSuccess;
}
Result cuFuncSetCacheConfig(void* function, int) {
  return is_function(function) ? kSuccess : kInvalidValue;
}
Result cuOccupancyMaxActiveClusters(int* count, void*, const void*) {
  *count = 1;
  return kSuccess;
}
Result cuPointerGetAttribute(void* value, int, std::uintptr_t address) {
  if (!address) return kInvalidValue;
  std::memcpy(value, &address, sizeof address);
  return kSuccess;
}

Result cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, void* stream,
                      void** params, void** extra) {
  return launched(function, {x, y, z}, {block_x, block_y, block_z}, shared, stream, params, extra);
}
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};
Result cuLaunchKernelEx(const LaunchConfig* config, void* function, void** params, void** extra) {
  return launched(function, config->grid, config->block, config->shared, config->stream, params,
                  extra);
}

// Graphs of kernels one after the other.
Result cuGraphCreate(Graph** graph, unsigned flags) {
  if (flags != 0) return kInvalidValue;
  *graph = new Graph{{}, current};
  return kSuccess;
}
Result cuGraphAddKernelNode_v2(Node** node, Graph* graph, Node* const* before, std::size_t count,
                               const NodeValues* values) {
  if (!current) return kInvalidContext;
  if (!is_function(values->function) || values->params == nullptr) return kInvalidValue;
  bool in_order = graph->nodes.empty() ? count == 0
                                       : count == 1 && before[0] == graph->nodes.back();
  if (!in_order) return kInvalidValue;
  graph->nodes.push_back(*node = new Node{*values, true});
  return kSuccess;
}
// What is launched is the graph itself.
Result cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long flags) {
  if (Result refused = unsafe()) return refused;
  *executable = graph;
  return flags == 0 ? kSuccess : kInvalidValue;
}
Result cuGraphExecKernelNodeSetParams_v2(Graph* graph, Node* node, const NodeValues* values) {
  if (!current) return kInvalidContext;
  bool known = false;
  for (Node* x : graph->nodes) known |= x == node;
  if (!known || values->function != node->values.function) return kInvalidValue;
  *node = {*values, true};
  return kSuccess;
}
Result cuGraphLaunch(Graph* graph, void* stream) {
  for (Node* x : graph->nodes) {
    if (!x->given) return kInvalidValue;
    NodeValues v = x->values;
    if (Result refused = launched(v.function, v.grid, v.block, v.shared, stream, v.params, v.extra)) {
      return refused;
    }
    x->given = false;
  }
  ++graphs_launched;
  return kSuccess;
}

// The map is what emulated_sm90.hpp reads: address, sizes, strides in elements, rows and columns of
// a box. 16-bit elements.
Result cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address,
                              const std::uint64_t* sizes, const std::uint64_t* strides,
                              const std::uint32_t* box, const std::uint32_t* element_strides,
                              int interleave, int swizzle, int, int) {
  if (rank != 4 || interleave != 0) return kInvalidValue;
  if (!address || reinterpret_cast<std::uintptr_t>(address) % 16) return kInvalidValue;
  constexpr unsigned kSwizzleBytes[] = {1u << 20, 32, 64, 128};
  constexpr int kFloat16 = 6, kFloat32 = 7, kBFloat16 = 9;
  if (type != kFloat16 && type != kFloat32 && type != kBFloat16) return kInvalidValue;
  const unsigned bytes = type == kFloat32 ? 4 : 2, width = bytes * box[0];
  if (swizzle < 0 || swizzle > 3 || width > kSwizzleBytes[swizzle] || width % 16) {
    return kInvalidValue;
  }
  struct {
    void* address; int sizes[4]; std::int64_t strides[4]; int rows, columns, bytes; char rest[60];
  } content{};
  static_assert(sizeof content == 128);
  content.address = address;
  for (unsigned i = 0; i < rank; ++i) {
    if (!sizes[i] || sizes[i] > (1ull << 32) || !box[i] || box[i] > 256) return kInvalidValue;
    if (element_strides[i] != 1) return kInvalidValue;
    if (i && (strides[i - 1] % 16 || strides[i - 1] >= (1ull << 40))) return kInvalidValue;
    content.sizes[i] = int(sizes[i]);
    content.strides[i] = i ? std::int64_t(strides[i - 1] / bytes) : 1;
  }
  content.rows = int(box[1]);
  content.columns = int(box[0]);
  content.bytes = int(bytes);
  std::memcpy(map, &content, sizeof content);
  return kSuccess;
}

// NVRTC asks a driver that is loaded for tables of its tools, and calls this without looking.
Result cuGetExportTable(const void** table, const void*) {
  *table = nullptr;
  return kNotFound;
}

// Names as the driver's users know them, the version after them left out.
Result cuGetProcAddress_v2(const char* name, void** function, int, std::uint64_t, int* status) {
  Dl_info own;
  dladdr(reinterpret_cast<void*>(&cuInit), &own);
  void* self = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *function = dlsym(self, name);
  if (*function == nullptr) *function = dlsym(self, (std::string(name) + "_v2").c_str());
  if (status) *status = *function ? 0 : 1;
  return *function ? kSuccess : kNotFound;
}
}
