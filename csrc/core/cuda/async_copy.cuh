// cp.async: copies from global to shared memory that run while the threads compute (sm_80 and up).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pycompress::cuda {

// 16 bytes, both addresses aligned to 16; zeros instead where not `valid` (then `from` is not read).
__device__ __forceinline__ void async_copy16(void* to, const void* from, bool valid) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::async_copy(to, from, valid ? 16 : 0, valid ? 0 : 16);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#endif
}

// kBytes (4, 8 or 16) from an address that is always readable, both addresses aligned to kBytes.
template <int kBytes>
__device__ __forceinline__ void async_copy(void* to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::async_copy(to, from, kBytes);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
#endif
}

// Closes a group of copies of this thread.
__device__ __forceinline__ void async_commit() {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of this thread's groups are on their way. Other threads see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void async_wait() {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace pycompress::cuda
