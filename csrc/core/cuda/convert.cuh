// float32, bfloat16 and float16 in device code: conversions to nearest even, eight values at a time, the fused activations.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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

// Neighbours in memory, moved with accesses of 4, 8 or 16 bytes, to which they are aligned.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};
template <class T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Eight {
  T v[8];
};

template <class Values>
using Words = std::conditional_t<alignof(Values) == 16, uint4, std::conditional_t<alignof(Values) == 8, uint2, uint32_t>>;

template <class Values>
__device__ __forceinline__ void move(void* to, const void* from) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Values) / alignof(Values)); ++i)
    static_cast<Words<Values>*>(to)[i] = static_cast<const Words<Values>*>(from)[i];
}
template <class T>
__device__ __forceinline__ Four<T> load4(const T* p) {
  Four<T> out;
  move<Four<T>>(&out, p);
  return out;
}
template <class T>
__device__ __forceinline__ Eight<T> load8(const T* p) {
  Eight<T> out;
  move<Eight<T>>(&out, p);
  return out;
}
template <class T>
__device__ __forceinline__ void store4(T* p, const Four<T>& values) {
  move<Four<T>>(p, &values);
}
template <class T>
__device__ __forceinline__ void store8(T* p, const Eight<T>& values) {
  move<Eight<T>>(p, &values);
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

// All of an array, with one decision.
template <int kCount>
__device__ __forceinline__ void activate(float (&v)[kCount], Activation activation) {
  const auto all = [&](Activation one) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = activate(v[i], one);
  };
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return all(Activation::relu);
    case Activation::gelu:
      return all(Activation::gelu);
    case Activation::silu:
      return all(Activation::silu);
    case Activation::relu6:
      return all(Activation::relu6);
    case Activation::hardswish:
      return all(Activation::hardswish);
  }
}

}  // namespace pycompress::cuda
