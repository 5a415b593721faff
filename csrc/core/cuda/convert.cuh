// float32, bfloat16 and float16 in device code: conversions to nearest even, eight values at a time, the fused activations.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/types.h"

namespace pycompress::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Eight neighbours in memory, moved with 16-byte accesses where they are aligned.
template <class T>
struct alignas(16) Eight {
  T v[8];
};

template <class T>
__device__ __forceinline__ Eight<T> load8(const T* p) {
  Eight<T> out;
  const uint4* from = reinterpret_cast<const uint4*>(p);
  uint4* to = reinterpret_cast<uint4*>(&out);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Eight<T>) / 16); ++i) to[i] = from[i];
  return out;
}

template <class T>
__device__ __forceinline__ void store8(T* p, const Eight<T>& values) {
  const uint4* from = reinterpret_cast<const uint4*>(&values);
  uint4* to = reinterpret_cast<uint4*>(p);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Eight<T>) / 16); ++i) to[i] = from[i];
}

// As torch: relu keeps NaN, gelu is the exact one.
__device__ __forceinline__ float activate(float v, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return v < 0.0f ? 0.0f : v;
    case Activation::gelu:
      return v * 0.5f * (1.0f + erff(v * 0.70710678118654752f));
    case Activation::silu:
      return v / (1.0f + expf(-v));
    case Activation::relu6:
      return v < 0.0f ? 0.0f : v > 6.0f ? 6.0f : v;
    case Activation::hardswish:
      return v * (v < -3.0f ? 0.0f : v > 3.0f ? 6.0f : v + 3.0f) * (1.0f / 6.0f);
    default:
      return v;
  }
}

}  // namespace pycompress::cuda
