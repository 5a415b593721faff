// How an int32 sum leaves a convolution: out = act(float(sum - zero_point * weight_sum) * (image_scale * scale) + bias + residual), one
// fma, the rest in float32; or that as int8.
#pragma once
#include <type_traits>

#include "core/cuda/convert.cuh"
#include "int8_conv2d/int8_conv2d_cuda.h"

namespace pycompress::int8_conv2d {

// OutputArgs as kernels take it, with what follows from it.
struct Output {
  OutputArgs args;
  float out_inverse;  // int8
  int64_t channels, plane;
  bool aligned;  // channels_last: eight channels from a multiple of eight on can be moved at once

  Output(const ConvArgs& conv, int64_t columns)
      : args(conv.output),
        out_inverse(args.out_type == Element::i8 ? 1.0f / args.out_scale : 0.0f),
        channels(conv.shape.o),
        plane(conv.out_h * conv.out_w),
        aligned(channels % 8 == 0 && columns % 8 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0 &&
                reinterpret_cast<uintptr_t>(args.residual) % 16 == 0) {}

  __device__ __forceinline__ int64_t index(int64_t image, int64_t pixel, int64_t channel) const {
    return args.channels_last ? (image * plane + pixel) * channels + channel : (image * channels + channel) * plane + pixel;
  }
  // Between neighbouring channels.
  __device__ __forceinline__ int64_t channel_stride() const { return args.channels_last ? 1 : plane; }
  __device__ __forceinline__ float image_scale(int64_t image) const {
    return args.image_scale ? args.x_scale + __ldg(args.image_scale + image) : args.x_scale;
  }
};

// What the sums of a channel need.
struct Channel {
  float scale = 0.0f, bias = 0.0f;
  int32_t offset = 0;  // zero_point * weight_sum, modulo 2^32

  __device__ __forceinline__ void load(const OutputArgs& p, int64_t channel) {
    scale = __ldg(p.scale + channel);
    if (p.bias) bias = __ldg(p.bias + channel);
    if (p.zero_point)
      offset = static_cast<int32_t>(static_cast<uint32_t>(p.zero_point) * static_cast<uint32_t>(__ldg(p.weight_sum + channel)));
  }
};

__device__ __forceinline__ float residual_at(const OutputArgs& p, int64_t index) {
  switch (p.residual_type) {
    case Element::f32:
      return static_cast<const float*>(p.residual)[index];
    case Element::bf16:
      return cuda::to_float(static_cast<const __nv_bfloat16*>(p.residual)[index]);
    case Element::f16:
      return cuda::to_float(static_cast<const __half*>(p.residual)[index]);
    default:
      return static_cast<float>(static_cast<const int8_t*>(p.residual)[index] - p.residual_zero_point) * p.residual_scale;
  }
}

// Eight neighbours from an aligned index.
__device__ __forceinline__ void residual_at(const OutputArgs& p, int64_t index, float (&r)[8]) {
  const auto widen = [&](auto* from) {
    const auto values = cuda::load8(from + index);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (std::is_same_v<decltype(from), const int8_t*>)
        r[i] = static_cast<float>(values.v[i] - p.residual_zero_point) * p.residual_scale;
      else
        r[i] = cuda::to_float(values.v[i]);
    }
  };
  switch (p.residual_type) {
    case Element::f32:
      return widen(static_cast<const float*>(p.residual));
    case Element::bf16:
      return widen(static_cast<const __nv_bfloat16*>(p.residual));
    case Element::f16:
      return widen(static_cast<const __half*>(p.residual));
    case Element::i8:
      return widen(static_cast<const int8_t*>(p.residual));
  }
}

// y = the results of neighbouring channels of a pixel in float32. `residual` is read only if there is one.
template <int kCount>
__device__ __forceinline__ void finish(float (&y)[kCount], const int32_t (&sums)[kCount], float image_scale,
                                       const Channel (&channels)[kCount], const float (&residual)[kCount], const OutputArgs& p) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    // Wrapping: only the difference is certain to fit.
    const uint32_t sum = static_cast<uint32_t>(sums[i]) - static_cast<uint32_t>(channels[i].offset);
    y[i] = fmaf(static_cast<float>(static_cast<int32_t>(sum)), image_scale * channels[i].scale, channels[i].bias);
  }
  if (p.residual) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] += residual[i];
  }
  cuda::activate(y, p.activation);
}

template <class Out>
__device__ __forceinline__ Out to_output(float y, const Output& p) {
  if constexpr (std::is_same_v<Out, int8_t>) {
    const int zero = p.args.out_zero_point;
    const float low = static_cast<float>(p.args.out_min - zero), high = static_cast<float>(127 - zero);
    // NaN becomes the zero point. Clamped as a float: the conversion is always in range.
    const float rounded = y == y ? fminf(fmaxf(rintf(y * p.out_inverse), low), high) : 0.0f;
    return static_cast<int8_t>(static_cast<int>(rounded) + zero);
  } else {
    return cuda::from_float<Out>(y);
  }
}

// The sums of `count` (at most 8) neighbouring channels of a pixel; the first channel is a multiple of 8 in its set.
template <class Out>
__device__ __forceinline__ void store_channels(const Output& p, int64_t image, int64_t pixel, int64_t first, int count,
                                               const int32_t (&sums)[8], const Channel (&channels)[8]) {
  const int64_t index = p.index(image, pixel, first), stride = p.channel_stride();
  Out* const out = static_cast<Out*>(p.args.out) + index;
  const bool together = p.aligned && p.args.channels_last && count == 8;
  float residual[8] = {};
  if (p.args.residual) {
    if (together) {
      residual_at(p.args, index, residual);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count) residual[i] = residual_at(p.args, index + i * stride);
    }
  }
  float y[8];
  finish(y, sums, p.image_scale(image), channels, residual, p.args);
  cuda::Eight<Out> values;
#pragma unroll
  for (int i = 0; i < 8; ++i) values.v[i] = to_output<Out>(y[i], p);
  if (together) {
    cuda::store8(out, values);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) out[i * stride] = values.v[i];
  }
}

// Calls `run` with a null pointer to the output type.
template <class Run>
void with_out_type(Element type, const Run& run) {
  switch (type) {
    case Element::f32:
      return run(static_cast<float*>(nullptr));
    case Element::bf16:
      return run(static_cast<__nv_bfloat16*>(nullptr));
    case Element::f16:
      return run(static_cast<__half*>(nullptr));
    case Element::i8:
      return run(static_cast<int8_t*>(nullptr));
  }
}

}  // namespace pycompress::int8_conv2d
