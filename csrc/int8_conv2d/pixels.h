// Channels in the lanes for layers with small groups and channels_last inputs. Private to csrc/int8_conv2d.
//
// Depthwise: a dword of operands holds four neighbouring taps of one channel, and one vpdpbusd multiplies those of 16 channels.
// Bytes of 64 channels of a pixel lie together, transposed as 4x4 dwords: byte 16 l + 4 j + i is channel 16 j + 4 l + i. That is how
// packs leave them, and interleaving the bytes of four pixels then gives dwords of channels in their own order.
#pragma once
#include "int8_conv2d/int8_conv2d.h"

namespace pycompress::int8_conv2d {

// Up to 64 channels of a block of output rows.
struct DepthwisePixels {
  const char* x;  // operands of the first pixel of the first window, 64 bytes to a pixel
  int64_t row;    // bytes between rows
  int64_t kh, kw, stride_h, stride_w, dilation_h, dilation_w;
  const int32_t* weights;  // dwords of kernel row k and taps 4 d to 4 d + 3 at [(k * ceil(kw / 4) + d) * weight_step + channel]
  int64_t weight_step;     // these and offsets are readable up to the next multiple of 64 channels
  const int32_t* offsets;  // subtracted from every sum
  float image_scale;
  const float *scale, *bias;  // bias may be null
  Activation activation;
  int64_t rows, cols, channels;
  float* out;
  int64_t out_row, out_pixel;  // elements
};

// A row of output pixels, up to 16 output channels of neighbouring groups of 4, 8, ... input channels.
struct GroupedPixels {
  const char* x;       // u8 operands of the first pixel, first group
  int64_t pixel_step;  // bytes between the windows of neighbouring output pixels
  const int64_t* taps;
  int64_t tap_count;       // byte offsets from the corner of a window
  int64_t quads;           // dwords of one group
  const int32_t* index;    // [quads][16]: which dword of the groups' pixel each output channel takes, below 16
  const int32_t* weights;  // [tap_count][quads][16] dwords
  const int32_t* offsets;  // 16, subtracted from every sum
  float image_scale;
  const float *scale, *bias;  // bias may be null
  Activation activation;
  int64_t pixels, channels;
  float* out;
  int64_t out_pixel;  // elements
};

struct PixelKernel {
  // Pixels of `channels` channels, x_step elements apart, to dst[channel / 64 * block_step + pixel * 64 ...]. Returns 0, or NaN if an
  // element is NaN or Inf.
  float (*quantize)(const float* x, int64_t x_step, int64_t channels, int64_t pixels, float inverse, int zero_point, int quant_min,
                    char* dst, int64_t block_step);
  void (*load)(const int8_t* x, int64_t x_step, int64_t channels, int64_t pixels, char* dst, int64_t block_step);
  void (*depthwise)(const DepthwisePixels& pixels);
  // Reads 64 bytes from every tap on at the most.
  void (*grouped)(const GroupedPixels& pixels);
};

}  // namespace pycompress::int8_conv2d
