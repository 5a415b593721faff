// The part of CUDA's runtime and device library that our kernels use, on the host (see emulation.h).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>

#include "emulation.h"
#include "mbarrier.h"
#include "wgmma.h"

#define PYCOMPRESS_CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local  // one copy per block: emulation.h swaps them. Not for `extern __shared__`
#define __constant__ static
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900  // tests pass another with -D
#endif

using emulation::dim3;
using emulation::uint3;
inline constexpr int warpSize = 32;

namespace emulation {
// Objects, not macros: gridDim and blockDim are fields of cudaLaunchConfig_t too.
enum class Builtin { thread, block, block_dim, grid_dim };
inline unsigned builtin(Builtin which, int axis) {
  const auto pick = [axis](unsigned x, unsigned y, unsigned z) { return axis == 0 ? x : axis == 1 ? y : z; };
  const uint3 t = machine.current->thread, b = machine.current->block->index;
  if (which == Builtin::thread) return pick(t.x, t.y, t.z);
  if (which == Builtin::block) return pick(b.x, b.y, b.z);
  const dim3 d = which == Builtin::block_dim ? machine.block : machine.grid;
  return pick(d.x, d.y, d.z);
}
template <Builtin which>
struct BuiltinVector {
  template <int axis>
  struct Axis {
    operator unsigned() const { return builtin(which, axis); }
  };
  Axis<0> x;
  Axis<1> y;
  Axis<2> z;
};
}  // namespace emulation
inline constexpr emulation::BuiltinVector<emulation::Builtin::thread> threadIdx{};
inline constexpr emulation::BuiltinVector<emulation::Builtin::block> blockIdx{};
inline constexpr emulation::BuiltinVector<emulation::Builtin::block_dim> blockDim{};
inline constexpr emulation::BuiltinVector<emulation::Builtin::grid_dim> gridDim{};

// ---- vectors
#define EMULATION_VECTORS(T, name, a1, a2, a4)               \
  struct name##1 { T x; };                                   \
  struct alignas(a2) name##2 { T x, y; };                    \
  struct name##3 { T x, y, z; };                             \
  struct alignas(a4) name##4 { T x, y, z, w; };              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTORS(float, float, 4, 8, 16)
EMULATION_VECTORS(int, int, 4, 8, 16)
EMULATION_VECTORS(short, short, 2, 4, 8)
EMULATION_VECTORS(unsigned short, ushort, 2, 4, 8)
EMULATION_VECTORS(signed char, char, 1, 2, 4)
EMULATION_VECTORS(unsigned char, uchar, 1, 2, 4)
EMULATION_VECTORS(double, double, 8, 16, 16)
EMULATION_VECTORS(long long, longlong, 8, 16, 16)
#undef EMULATION_VECTORS
struct uint1 {
  unsigned x;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- barriers and warp operations. The line tells divergent calls apart.
#define EMULATION_LINE int line = __builtin_LINE()
inline void __syncthreads(EMULATION_LINE) { emulation::block_barrier(line); }
inline int __syncthreads_or(int value, EMULATION_LINE) {
  static thread_local int any;  // in the block's shared memory
  emulation::block_barrier(line);
  any = 0;
  emulation::block_barrier(line);
  any |= value != 0;
  emulation::block_barrier(line);
  return any;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_LINE) { emulation::gather(mask, 0, "__syncwarp", line); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { emulation::fail("__trap"); }

namespace emulation {
template <typename T>
T shuffle(unsigned mask, T value, int source, const char* what, int line) {
  const auto all = gather(mask, value, what, line);
  if (!(mask >> source & 1u)) fail(std::string(what) + ": reads lane " + std::to_string(source) + ", which is not in the mask");
  return all[static_cast<size_t>(source)];
}
inline int lane() { return static_cast<int>(machine.current->lane); }
}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_LINE) {
  const int base = emulation::lane() / width * width;
  return emulation::shuffle(mask, value, base + (source & (width - 1)), "__shfl_sync", line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATION_LINE) {
  const int own = emulation::lane(), other = own ^ lanes;
  return emulation::shuffle(mask, value, other / width <= own / width ? other : own, "__shfl_xor_sync", line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_LINE) {
  const int own = emulation::lane(), other = own + static_cast<int>(delta);
  return emulation::shuffle(mask, value, other / width == own / width ? other : own, "__shfl_down_sync", line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_LINE) {
  const int own = emulation::lane(), other = own - static_cast<int>(delta);
  return emulation::shuffle(mask, value, other >= own / width * width ? other : own, "__shfl_up_sync", line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_LINE) {
  const auto all = emulation::gather(mask, predicate, "__ballot_sync", line);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= (mask >> i & 1u && all[i]) ? 1u << i : 0u;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_LINE) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMULATION_LINE) { return __ballot_sync(mask, predicate, line) == mask; }
#define EMULATION_REDUCE(name, expression)                        \
  template <typename T>                                           \
  T name(unsigned mask, T value, EMULATION_LINE) {                \
    const auto all = emulation::gather(mask, value, #name, line); \
    bool first = true;                                            \
    T a{};                                                        \
    for (unsigned i = 0; i < 32; ++i)                             \
      if (mask >> i & 1u) {                                       \
        const T b = all[i];                                       \
        a = first ? b : (expression);                             \
        first = false;                                            \
      }                                                           \
    return a;                                                     \
  }
EMULATION_REDUCE(__reduce_add_sync, static_cast<T>(a + b))
EMULATION_REDUCE(__reduce_min_sync, a < b ? a : b)
EMULATION_REDUCE(__reduce_max_sync, a > b ? a : b)
EMULATION_REDUCE(__reduce_or_sync, static_cast<T>(a | b))
#undef EMULATION_REDUCE

// ---- atomics: only one thread runs at a time
template <typename T, typename U>
T atomicAdd(T* p, U value) {
  const T old = *p;
  *p = static_cast<T>(old + value);
  return old;
}
template <typename T, typename U>
T atomicMax(T* p, U value) {
  const T old = *p;
  *p = old < static_cast<T>(value) ? static_cast<T>(value) : old;
  return old;
}
template <typename T, typename U>
T atomicMin(T* p, U value) {
  const T old = *p;
  *p = static_cast<T>(value) < old ? static_cast<T>(value) : old;
  return old;
}
template <typename T, typename U>
T atomicOr(T* p, U value) {
  const T old = *p;
  *p = old | static_cast<T>(value);
  return old;
}
template <typename T, typename U>
T atomicExch(T* p, U value) {
  const T old = *p;
  *p = static_cast<T>(value);
  return old;
}
template <typename T>
T atomicCAS(T* p, T compare, T value) {
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}

// ---- loads and stores with cache hints
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}

// ---- arithmetic
using std::isfinite;
using std::isinf;
using std::isnan;
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline int __float2int_rn(float a) {  // saturating, NaN to 0, as cvt.rni.s32.f32
  if (a != a) return 0;
  if (a >= 2147483648.0f) return INT32_MAX;
  if (a < -2147483648.0f) return INT32_MIN;
  return static_cast<int>(std::nearbyintf(a));
}
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline unsigned __float_as_uint(float a) {
  unsigned u;
  std::memcpy(&u, &a, 4);
  return u;
}
inline int __float_as_int(float a) { return static_cast<int>(__float_as_uint(a)); }
inline float __uint_as_float(unsigned u) {
  float a;
  std::memcpy(&a, &u, 4);
  return a;
}
inline float __int_as_float(int u) { return __uint_as_float(static_cast<unsigned>(u)); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t all = static_cast<uint64_t>(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(all >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= byte << (8 * i);
  }
  return out;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}
template <typename T>
size_t __cvta_generic_to_shared(T* p) {
  return reinterpret_cast<size_t>(p);
}

// ---- runtime
using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributeNonPortableClusterSizeAllowed = 13 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4, cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulation {
struct Function {
  size_t dynamic_bytes = 48 * 1024;
  bool large_clusters = false;
};
inline std::map<const void*, Function> functions;
inline std::string launch_error;  // text of the last failed launch
inline cudaError_t last_error = cudaSuccess;
inline constexpr int kDevices = 2;
inline int device = 0;                 // the current one
inline std::vector<int> launched_on;  // devices that were current at launches, for tests
inline constexpr size_t kOptin = __CUDA_ARCH__ >= 900 ? 232448 : 166912;

inline cudaError_t refuse(cudaError_t error, const std::string& text) {
  launch_error = text;
  return last_error = error;
}
}  // namespace emulation

template <typename F>
cudaError_t cudaFuncSetAttribute(F* function, cudaFuncAttribute attribute, int value) {
  auto& f = emulation::functions[reinterpret_cast<const void*>(function)];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    f.large_clusters = value != 0;
  } else if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || static_cast<size_t>(value) > emulation::kOptin)
      return emulation::refuse(cudaErrorInvalidValue, "more shared memory than a block can have");
    f.dynamic_bytes = static_cast<size_t>(value);
  }
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  using emulation::refuse;
  const dim3 grid = config->gridDim, block = config->blockDim;
  dim3 cluster{1, 1, 1};
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& c = config->attrs[i].val.clusterDim;
      cluster = {c.x, c.y, c.z};
    }
  const auto& function = emulation::functions[reinterpret_cast<const void*>(kernel)];
  if (grid.count() == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return refuse(cudaErrorInvalidConfiguration, "grid");
  if (block.count() == 0 || block.count() > 1024 || block.z > 64) return refuse(cudaErrorInvalidConfiguration, "block");
  if (config->dynamicSmemBytes > function.dynamic_bytes)
    return refuse(cudaErrorInvalidValue, "more dynamic shared memory than was asked for with cudaFuncSetAttribute");
  if (cluster.count() == 0 || cluster.count() > (function.large_clusters ? 16u : 8u) || (cluster.count() > 1 && __CUDA_ARCH__ < 900) ||
      grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    return refuse(cudaErrorInvalidConfiguration, "cluster");
  emulation::launched_on.push_back(emulation::device);
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  emulation::run(grid, block, cluster, config->dynamicSmemBytes, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaPeekAtLastError() { return emulation::last_error; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : emulation::launch_error.c_str(); }
inline const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::kDevices) return emulation::refuse(cudaErrorInvalidDevice, "invalid device ordinal");
  return emulation::device = device, cudaSuccess;
}
// For tests: the device of launch `i` since the last time that the end was reached, which is -1 and forgets them; -2: the current device.
extern "C" __attribute__((visibility("default"), used)) inline int emulation_launch_device(int i) {
  if (i == -2) return emulation::device;
  if (i < static_cast<int>(emulation::launched_on.size())) return emulation::launched_on[static_cast<size_t>(i)];
  emulation::launched_on.clear();
  return -1;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 4
           : attribute == cudaDevAttrComputeCapabilityMajor       ? __CUDA_ARCH__ / 100
           : attribute == cudaDevAttrComputeCapabilityMinor       ? __CUDA_ARCH__ / 10 % 10
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(emulation::kOptin)
                                                                  : 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
