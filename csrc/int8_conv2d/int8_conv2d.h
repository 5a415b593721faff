// 2-d convolution on int8 weights with activations quantised on the fly and an exact int32 sum.
//
//   q[n][c][i][j]   = clamp(round_half_even(x * (1 / sa[n])) + za, quant_min, 127)        or x itself, if x is int8
//   sum[n][o][y][x] = sum over c, ky, kx of (q[n][c][y*sh - ph + ky*dh][x*sw - pw + kx*dw] - za) * w[o][c][ky][kx]
//   out             = act(float(sum) * (sa[n] * sb[o]) + bias[o] + residual)              one fma, the rest in float32
//   or, int8:         clamp(round_half_even(out * (1 / so)) + zo, out_min, 127)
//
// Padding is real zero, i.e. q = za. sa is static, or dynamic: max|x| of the image / 127, with za = 0.
// Exact under the limits on the depth K = C / groups * kh * kw in int8_matmul.h.
//
// Five ways to the same sum, none of which writes an im2col matrix:
//   direct     a band of quantised rows (NHWC, with its padding) and pointers into it: an indirect GEMM over the tiles
//              of int8_matmul (Dukhan, "The Indirect Convolution Algorithm", arXiv:1907.02129)
//   winograd   3x3, stride 1: F(4x4, 3x3) in integers, exact modulo 2^32 (winograd.cpp)
//   planes     NCHW to NCHW with pixels in the lanes (planes.cpp)
//   grouped    small groups, channels in the lanes (grouped.cpp)
//   depthwise  one channel per group: four taps to a product (depthwise_bytes.cpp), or fma on whole numbers in float32, exact below
//              2^24 (depthwise.cpp)
#pragma once
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_conv2d {

using Gemm = int8_matmul::Kernel;

struct Shape {
  int64_t n, c, h, w;  // input
  int64_t o, kh, kw;   // weight (o, c / groups, kh, kw)
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;

  int64_t out_h() const { return (h + 2 * pad_h - dilation_h * (kh - 1) - 1) / stride_h + 1; }
  int64_t out_w() const { return (w + 2 * pad_w - dilation_w * (kw - 1) - 1) / stride_w + 1; }
  int64_t taps() const { return kh * kw; }
};

// Element types of x, residual and out: DType and int8.
enum class Element : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

struct Args {
  Shape shape;
  const void* x;
  Element x_type;
  int64_t x_stride[4];   // n, c, h, w in elements; the stride of c (channels_last) or of w is 1
  bool x_channels_last;  // an int8 x must be; depthwise layers need the layout of out
  const void* packed;
  const float* scale;  // per output channel
  const float* bias;   // or null
  bool dynamic;        // x_scale and x_zero_point are not read
  float x_scale;
  int x_zero_point;
  int quant_min;  // -127 (symmetric) or -128
  Activation activation;
  void* out;  // dense
  Element out_type;
  bool out_channels_last;
  float out_scale;  // the rest for int8 only
  int out_zero_point, out_min;
  const void* residual;  // or null: dense, shape and layout of out
  Element residual_type;
  float residual_scale;  // for int8 only
  int residual_zero_point;
};

struct PlaneKernel;
struct PixelKernel;
struct TileKernel;

struct Kernel {
  const char* name;
  Isa isa;
  const Gemm* gemm;  // operand format, tile and epilogue

  // Rows of pixels out of channel planes into operand format: dst[y][p][c] = q(x[c * plane + y * row + p]), strides of dst in bytes.
  // Within a row ascending in p, and may write up to 15 bytes behind each pixel. Returns 0, or NaN if an element is NaN or Inf.
  float (*quantize_planes)(const float* x, int64_t plane, int64_t row, int64_t channels, int64_t rows, int64_t pixels, float inverse,
                           int zero_point, int quant_min, char* dst, int64_t row_stride, int64_t pixel_stride);
  // out[c * plane + p] = y[p * ld + c]; y is readable up to the next multiple of 16 in p and c.
  void (*store_planes)(const float* y, int64_t ld, int64_t pixels, int64_t cols, float* out, int64_t plane);
  // y = act(y + residual), the residual float32 or int8: (r - zero_point) * scale
  void (*add_f32)(float* y, const float* residual, int64_t n, Activation activation);
  void (*add_i8)(float* y, const int8_t* residual, int64_t n, float scale, int zero_point, Activation activation);
  // out[r * ldo + c] = clamp(round_half_even(y[r * ld + c] * inverse) + zero_point, quant_min, 127); NaN becomes the zero point.
  void (*quantize_out)(const float* y, int64_t ld, int64_t rows, int64_t cols, float inverse, int zero_point, int quant_min, int8_t* out,
                       int64_t ldo);
  // dst = x - zero_point as floats, of int8 and of operands in the format of the GEMM (there zero_point is its correction).
  void (*center_i8)(const void* x, int64_t n, int zero_point, float* dst);
  void (*center_operands)(const void* x, int64_t n, int correction, float* dst);

  // dst = clamp(round_half_even(x * inverse), lo, hi), as floats. Returns 0, or NaN if an element is NaN or Inf.
  float (*round_row)(const float* x, int64_t n, float inverse, float lo, float hi, float* dst);
  // dst[(x % phases) * phase_step + x / phases] = line[x]
  void (*split_phases)(const float* line, int64_t cols, int64_t phases, int64_t phase_step, float* dst);
  // One channel: out[y * ldo + x] = act(fma(sum over t of w[t] * taps[t][y * row_step + x], scale, bias)). Taps are readable
  // and out is writable up to the next multiple of 16 in x.
  void (*depthwise_plane)(const float* const* taps, const float* w, int64_t count, int64_t rows, int64_t cols, int64_t row_step,
                          float scale, float bias, Activation activation, float* out, int64_t ldo);
  // One row of pixels, channels in the lanes: w is (count, channels), pixels lie `step` floats apart.
  void (*depthwise_pixels)(const float* const* taps, const float* w, int64_t count, int64_t pixels, int64_t step, int64_t channels,
                           float image_scale, const float* scale, const float* bias, Activation activation, float* out);

  // Winograd F(4x4, 3x3), see winograd.cpp; all null where winograd_rows is 0.
  int winograd_rows;  // tiles per call of winograd_tile
  // Measured cycles: per multiply-accumulate of the direct way and of winograd_tile, and for the transforms per tile and input
  // channel, per weight (3x3) and per tile and output channel.
  struct Cost {
    double direct, gemm, input, weight, output;
  } cost;
  // 6x6 pixels of operands -> v[36][channels], position stride in elements.
  void (*winograd_input)(const void* src, int64_t row_stride, int64_t pixel_stride, int64_t channels, int zero_point, int16_t* v,
                         int64_t position_stride);
  // 16 columns of a packed panel -> u[36][channels * 16], in the order of winograd_tile
  void (*winograd_weight)(const int8_t* panel, int cols, int64_t channels, int16_t* u, int64_t position_stride);
  // acc[rows][16] = rows of v times u, at one position
  void (*winograd_tile)(const int16_t* v, int64_t ld, int rows, int64_t channels, const int16_t* u, int32_t* acc);
  // m[36][16] -> 4x4 pixels of 16 columns: act(fma(sum, image_scale * scale, bias))
  void (*winograd_output)(const int32_t* m, int64_t position_stride, float image_scale, const float* scale, const float* bias,
                          Activation activation, float* y, int64_t row_stride, int64_t pixel_stride);

  const PlaneKernel* planes = nullptr;  // pixels in the lanes (planes.h), where the instruction set has it
  // winograd_tile for two blocks of 16 columns, u_step and acc_step elements apart, where there are registers for it.
  void (*winograd_tile_pair)(const int16_t* v, int64_t ld, int rows, int64_t channels, const int16_t* u, int64_t u_step, int32_t* acc,
                             int64_t acc_step) = nullptr;
  const PixelKernel* pixels = nullptr;  // depthwise with channels in the lanes (pixels.h)
  const Cost* cost_intel = nullptr;     // instead of `cost` on Intel's cores, where it differs
  const TileKernel* tiles = nullptr;    // the direct way without sums and floats in memory (tiles.h)
  const Gemm* encoding = nullptr;       // in place of `gemm` for 1x1 layers whose pixels are worth encoding (gemm_for)
};

const KernelList<Kernel>& kernels();

// Packed weights: one int8_matmul panel set per group (of a whole multiple of kr per segment), then per output channel
// the sum of the weights and the sum of their absolute values, int32[o] each. dilation_w and groups are part of the format.
size_t packed_bytes(const Kernel& kernel, const Shape& shape);
void pack(const Kernel& kernel, const Shape& shape, const int8_t* weight, void* packed);
void unpack(const Kernel& kernel, const Shape& shape, const void* packed, int8_t* weight);

// algorithm: "" = the fastest; "direct", "winograd", "planes", "grouped" or "depthwise" for tests and benchmarks, an error where it does
// not apply.
void conv2d(const Kernel& kernel, const Args& args, const char* algorithm);
const char* chosen(const Kernel& kernel, const Args& args);

}  // namespace pycompress::int8_conv2d
