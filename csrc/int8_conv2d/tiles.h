// Tiles of the direct way whose sums become results in registers. Private to csrc/int8_conv2d.
#pragma once
#include "int8_conv2d/int8_conv2d.h"

namespace pycompress::int8_conv2d {

// What becomes of the sums of up to 64 neighbouring output channels of an image, results being channels_last float32 or int8:
//   y = fma(float(sum - extra), scale, bias) + (residual - residual_zero_point) * residual_scale, then the activation; int8 as quantize_out
struct Finish {
  alignas(64) int32_t extra[int8_matmul::kMaxNr];  // zero behind the last channel, like scale and bias
  alignas(64) float scale[int8_matmul::kMaxNr];
  alignas(64) float bias[int8_matmul::kMaxNr];
  int used;          // channels that exist
  int64_t channels;  // elements from one pixel to the next, of results and of the residual
  Activation activation;
  bool bytes;  // int8 results; the rest is for them only
  float inverse;
  int zero_point, lowest;
  bool add;  // a residual
  float residual_scale;
  int residual_zero_point;
};

struct TileKernel {
  bool (*takes)(Activation activation);
  // Rows and weights as for Gemm::tile; out and residual: the first pixel, the first of the channels.
  void (*tile)(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, const Finish& finish, void* out,
               const int8_t* residual);
};

}  // namespace pycompress::int8_conv2d
