// The int8 convolution on a GPU: quantise the images to pixels of int8 channels, convolve, finish. Contract and arithmetic are those of
// int8_conv2d.h.
//
// Between the steps lies q: int8 pixels (NHWC), where the channels of a set (one or several groups) are padded to a multiple of
// 4, 8 or 16 bytes, the unit that the kernels copy. An int8 x of that form is q itself. Padding around an image is not in
// memory: a copy that would come from there reads a line of zero points instead.
//
// Two ways to the sum:
//   gemm       implicit GEMM on mma.sync: rows are output pixels, the depth is (kh, kw, channels of a set), no im2col in memory
//   depthwise  one channel per group: four taps at a time by dp4a
//
// Python allocates, checks and plans (pycompress/ops/cuda/int8_conv2d.py); nothing here allocates or waits for the device. Plain
// C++: bindings include it.
#pragma once
#include <cstdint>

#include "core/types.h"
#include "int8_conv2d/int8_conv2d.h"

namespace pycompress::cuda {
struct Stream;
}

namespace pycompress::int8_conv2d {

struct QuantizeImagesArgs {
  int64_t n, c, pixels;
  const void* x;  // (n, c, pixels), or (n, pixels, c) if channels_last; images image_stride elements apart, dense inside
  Element x_type;
  int64_t image_stride;
  bool channels_last;              // an int8 x is
  int64_t sets, channels, padded;  // of a set: the channels it has, and the bytes it takes in q; the padding becomes 0
  bool dynamic;
  float x_scale;
  int x_zero_point, quant_min;
  uint32_t* partial;   // (n, partials), for dynamic scales
  int64_t partials;    // at most kMaxPartials
  float* image_scale;  // (n): what to add to x_scale (dynamic: to 0). The scale, or 0, and NaN for images with NaN or Inf. Not for int8
  int8_t* q;           // (n, pixels, sets * padded)
};

inline constexpr int64_t kMaxPartials = 256;
void quantize_images_cuda(const QuantizeImagesArgs& args, const cuda::Stream& stream);

// From the exact sum to the result; what Args in int8_conv2d.h says of the fields with these names.
struct OutputArgs {
  float x_scale;             // 0 if dynamic
  const float* image_scale;  // added to x_scale; or null
  int zero_point;            // of q
  const int32_t* weight_sum;
  const float* scale;
  const float* bias;  // or null
  Activation activation;
  void* out;
  Element out_type;
  bool channels_last;  // the layout of out and residual
  float out_scale;
  int out_zero_point, out_min;
  const void* residual;  // or null
  Element residual_type;
  float residual_scale;
  int residual_zero_point;
};

struct ConvArgs {
  Shape shape;
  int64_t out_h, out_w;
  const int8_t* q;                                 // aligned to the unit of copies, as are the strides
  int64_t image_stride, row_stride, pixel_stride;  // bytes
  int64_t sets, padded;                            // set s of a pixel starts at byte s * padded
  const int8_t* weight;                            // gemm: (o, depth); depthwise: (ceil(taps / 4), padded, 4)
  int64_t depth;                                   // taps * padded, rounded up to 16
  OutputArgs output;
  int64_t splits;    // blocks that share the depth of a tile
  int32_t* partial;  // with more than one: kernels add up here, see workspace_bytes
};

using Conv = void (*)(const ConvArgs&, const cuda::Stream&);

// bm x bn: output pixels and output channels of a block. The second number is the unit of copies: padded is a multiple of it.
void conv_cuda_128x128_16(const ConvArgs& args, const cuda::Stream& stream);
void conv_cuda_128x64_16(const ConvArgs& args, const cuda::Stream& stream);
void conv_cuda_128x64_8(const ConvArgs& args, const cuda::Stream& stream);
void conv_cuda_128x64_4(const ConvArgs& args, const cuda::Stream& stream);
void conv_cuda_64x64_16(const ConvArgs& args, const cuda::Stream& stream);
void conv_cuda_64x64_8(const ConvArgs& args, const cuda::Stream& stream);
void conv_cuda_64x64_4(const ConvArgs& args, const cuda::Stream& stream);

struct ConvConfig {
  const char* name;
  int bm, bn, unit;
  Conv run;
};

// pycompress/ops/cuda/int8_conv2d.py chooses by name and has the same sizes.
inline constexpr ConvConfig kConvConfigs[] = {
    {"128x128", 128, 128, 16, conv_cuda_128x128_16}, {"128x64", 128, 64, 16, conv_cuda_128x64_16},
    {"128x64_8", 128, 64, 8, conv_cuda_128x64_8},    {"128x64_4", 128, 64, 4, conv_cuda_128x64_4},
    {"64x64", 64, 64, 16, conv_cuda_64x64_16},       {"64x64_8", 64, 64, 8, conv_cuda_64x64_8},
    {"64x64_4", 64, 64, 4, conv_cuda_64x64_4},
};

// args.sets is 1, padded a multiple of 4.
void conv_cuda_depthwise(const ConvArgs& args, const cuda::Stream& stream);

}  // namespace pycompress::int8_conv2d
