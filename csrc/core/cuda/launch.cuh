// Launching kernels, and what goes wrong then. Every launch goes through launch(), so the tests can run the same source on the
// host: tests/cuda_emulation/ has a cuda_runtime.h that executes kernels with fibers (and defines PYCOMPRESS_CUDA_EMULATION).
//
// Nothing here synchronises with the device: an error inside a kernel shows at the next synchronisation, as with torch.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/cuda/stream.h"
#include "core/types.h"

namespace pycompress::cuda {

// Throws std::runtime_error (RuntimeError in Python) with CUDA's own text. `what` names the op.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // the error has been reported: the next call must not find it
  throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Makes a device current for a scope.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) : device_(device) {
    check(cudaGetDevice(&previous_), what);
    if (previous_ != device_) check(cudaSetDevice(device_), what);
  }
  ~DeviceGuard() {
    if (previous_ != device_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

struct Grid {
  dim3 blocks;
  unsigned threads = 0;
  size_t shared_bytes = 0;  // dynamic; more than 48 KB is asked for
  unsigned cluster = 1;     // blocks per cluster along x
};

// Starts `kernel`. A grid without blocks is no error and starts nothing. The caller holds a DeviceGuard.
template <class... Parameters, class... Arguments>
void launch(const char* what, const Grid& grid, void* stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  if (grid.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)), what);
  if (grid.cluster > 8) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = grid.cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...), what);
}

// The block's dynamic shared memory, aligned to 1024 bytes (the copy engine and wgmma want that of swizzled tiles).
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef PYCOMPRESS_CUDA_EMULATION
  return reinterpret_cast<T*>(emulation::machine.current->block->dynamic);
#else
  extern __shared__ __align__(1024) unsigned char pycompress_dynamic_shared[];
  return reinterpret_cast<T*>(pycompress_dynamic_shared);
#endif
}

}  // namespace pycompress::cuda
