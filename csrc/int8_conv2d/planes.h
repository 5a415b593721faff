// Pixels in the lanes: what planes (NCHW) want, since a vector of float32 pixels of one channel is a vector of their operands too.
// Nothing is transposed, on the way in or out. Private to csrc/int8_conv2d.
//
// An operand is a dword of u8 (q + 128) per pixel: four input channels of a pixel, or four neighbouring taps of one channel. One
// vpdpbusd multiplies 16 pixels of it with a dword of weights of one output channel.
#pragma once
#include "int8_conv2d/int8_conv2d.h"

namespace pycompress::int8_conv2d {

// Where the four taps 4 * part + j of each output pixel x lie in a row of w bytes: at x * stride + (4 * part + j) * dilation - pad;
// outside of the row they are `nothing`, the operand of real zero. Dwords of 16 pixels are gathered from 64 bytes by two shuffles.
struct Taps {
  int64_t w, stride, dilation, pad;
  int64_t parts;  // dwords per kernel row
  int nothing;
  alignas(64) int32_t dwords[16];  // shuffle of dwords: to each 128 bits what their 4 pixels need
  alignas(64) int8_t bytes[64];    // and of bytes within them
  const uint64_t* inside;          // [pixel / 16][part]: which bytes of the shuffled 64 lie in the row

  Taps(const Shape& s, int64_t out_w, int nothing, uint64_t* inside_memory);  // of inside_size(s, out_w)
  static bool fit(const Shape& s) { return s.stride_w <= 4 && s.stride_w + s.dilation_w <= 5; }
  static int64_t inside_size(const Shape& s, int64_t out_w) { return ceil_div(out_w, 16) * ceil_div(s.kw, 4); }
  int64_t offset(int64_t x, int64_t part) const { return x * stride + 4 * part * dilation - pad; }
  // Bytes that gather and depthwise may read before and behind the rows they are given.
  int64_t before() const { return round_up(pad, 64) + 64; }
  int64_t behind(int64_t out_w) const { return (out_w + 16) * stride + 4 * parts * dilation + 128; }
};

// One vector of output pixels of a block.
struct PlaneVector {
  int64_t a, out;  // bytes from the start of the block to its operands; results before it in the block
  uint16_t keep;   // lanes that hold results
};

// Where the dwords of every pixel go, or, with stride 2, those of the even or the odd pixels.
struct DwordTarget {
  char* dst;     // of the first one
  int64_t skip;  // that many are not written: they would lie before the row
  bool odd;
};

// One output channel of up to 3 vectors of pixels times up to 8 output channels, written to planes.
struct PlaneTile {
  const char* const* a;  // one operand vector each, at the first step
  int vectors;
  const int64_t *a_steps, *b_steps;  // bytes from a and b on, one pair per step
  int64_t steps;
  const int8_t* b;  // dwords of neighbouring output channels lie side by side; 8 (4 for up to 4 channels) are readable
  int channels;
  int32_t correction;  // sum is acc - correction * column_sum
  const int32_t* column_sum;
  float image_scale;
  const float *scale, *bias;  // bias may be null
  Activation activation;
  const uint16_t* keep;  // per vector: lanes that hold results; they are written without gaps,
  float* const* out;     // from here on
  int64_t plane;         // elements between output channels
};

// One channel of a depthwise convolution.
struct DepthwisePlane {
  const char* x;  // operands of input row 0; rows [0, h) that the output rows need are there
  const Taps* taps;
  int64_t h, kh, stride_h, dilation_h, pad_h;
  const int32_t* weights;  // dword of kernel row k and part d at [(k * parts + d) * weight_step]
  int64_t weight_step;
  int32_t offset;  // subtracted from every sum
  float scale, bias;
  Activation activation;
  int64_t y0, y1, ow;  // output rows
  float* out;          // row y0
  int64_t ldo;
};

// All null (and lanes 0) where an instruction set has no such way.
struct PlaneKernel {
  int lanes;
  // count pixels of one channel -> bytes. Returns 0, or NaN if one is NaN or Inf (so do the others).
  float (*quantize_bytes)(const float* x, int64_t count, float inverse, int zero_point, int quant_min, char* dst);
  // Up to 4 channels of rows of `count` pixels -> dwords in each of `targets`, whole vectors of them, rows ascending; if vectors are given
  // (one row, one target, stride 1), vector i goes to dst + vectors[i].a.
  float (*quantize_dwords)(const float* x, int64_t plane, int64_t row, int64_t channels, int64_t rows, int64_t count, int64_t stride,
                           float inverse, int zero_point, int quant_min, const DwordTarget* targets, int64_t target_count, int64_t dst_row,
                           const PlaneVector* vectors);
  // One row of bytes -> a dword of taps for each of `pixels` output pixels, whole vectors of them.
  void (*gather)(const char* row, const Taps& taps, int64_t part, int64_t pixels, char* dst);
  void (*tile)(const PlaneTile& tile);
  void (*depthwise)(const DepthwisePlane& plane);
};

inline constexpr int kPlaneVectors = 3, kPlaneChannels = 8;

}  // namespace pycompress::int8_conv2d
