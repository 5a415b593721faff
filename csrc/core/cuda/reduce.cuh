// Reductions over a warp and over a block; every thread gets the result.
#pragma once
#include <cuda_runtime.h>

namespace pycompress::cuda {

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Min {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
};

// Over groups of `kWidth` neighbouring lanes (a power of two). All 32 lanes call it.
template <int kWidth = 32, class Operation>
__device__ __forceinline__ float warp_reduce(float value, Operation operation) {
#pragma unroll
  for (int lanes = kWidth / 2; lanes > 0; lanes /= 2) value = operation(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

// Over a block of whole warps, at most 1024 threads. `scratch`: 32 floats of shared memory, free again when it returns.
template <class Operation>
__device__ __forceinline__ float block_reduce(float value, Operation operation, float* scratch) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  value = warp_reduce(value, operation);
  if (warps == 1) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int i = 1; i < warps; ++i) value = operation(value, scratch[i]);
  __syncthreads();
  return value;
}

}  // namespace pycompress::cuda
