// The output side: residual, activation, element type and memory layout of finished results.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/scratch.h"
#include "int8_conv2d/layout.h"

namespace pycompress::int8_conv2d {

Sink::Sink(const Kernel& kernel_, const Args& args_)
    : kernel(kernel_),
      args(args_),
      plane(args_.shape.out_h() * args_.shape.out_w()),
      inner(args_.residual ? Activation::none : args_.activation),
      outer(args_.residual ? args_.activation : Activation::none),
      out_inverse(args_.out_type == Element::i8 ? 1.0f / args_.out_scale : 0.0f) {}

void Sink::store(int64_t n, int64_t pixel, int64_t count, int64_t col, int64_t cols, float* y, int64_t ld) const {
  const int64_t o = args.shape.o;
  if (args.out_channels_last && args.out_type == Element::i8 && !args.residual) {
    kernel.quantize_out(y, ld, count, cols, out_inverse, args.out_zero_point, args.out_min,
                        static_cast<int8_t*>(args.out) + (n * plane + pixel) * o + col, o);
    return;
  }
  if (args.out_channels_last) {
    for (int64_t p = 0; p < count; ++p) store_run(y + p * ld, (n * plane + pixel + p) * o + col, cols);
    return;
  }
  const int64_t first = (n * o + col) * plane + pixel;
  if (args.out_type == Element::f32 && !args.residual) {
    kernel.store_planes(y, ld, count, cols, static_cast<float*>(args.out) + first, plane);
    return;
  }
  static thread_local Scratch scratch;
  const int64_t stride = round_up(count, 16);
  float* planes = scratch.get<float>(static_cast<size_t>(round_up(cols, 16) * stride));
  kernel.store_planes(y, ld, count, cols, planes, stride);
  for (int64_t c = 0; c < cols; ++c) store_run(planes + c * stride, first + c * plane, count);
}

void Sink::store_run(float* y, int64_t offset, int64_t count) const {
  if (args.residual) {
    const int64_t size = args.residual_type == Element::i8 ? 1 : args.residual_type == Element::f32 ? 4 : 2;
    const char* r = static_cast<const char*>(args.residual) + offset * size;
    if (args.residual_type == Element::bf16 || args.residual_type == Element::f16) {
      static thread_local Scratch scratch;
      float* wide = scratch.get<float>(static_cast<size_t>(count));
      kernel.gemm->widen(r, static_cast<DType>(args.residual_type), count, wide);
      kernel.add_f32(y, wide, count, outer);
    } else if (args.residual_type == Element::f32) {
      kernel.add_f32(y, reinterpret_cast<const float*>(r), count, outer);
    } else {
      kernel.add_i8(y, reinterpret_cast<const int8_t*>(r), count, args.residual_scale, args.residual_zero_point, outer);
    }
  }
  switch (args.out_type) {
    case Element::f32:
      std::memcpy(static_cast<float*>(args.out) + offset, y, static_cast<size_t>(count) * 4);
      return;
    case Element::i8:
      kernel.quantize_out(y, count, 1, count, out_inverse, args.out_zero_point, args.out_min, static_cast<int8_t*>(args.out) + offset,
                          count);
      return;
    default:
      kernel.gemm->narrow(y, count, static_cast<DType>(args.out_type), static_cast<uint16_t*>(args.out) + offset);
  }
}

void Sink::poison(int64_t n) const {
  const int64_t count = args.shape.o * plane, first = n * count;
  switch (args.out_type) {
    case Element::f32:
      std::fill_n(static_cast<float*>(args.out) + first, count, std::numeric_limits<float>::quiet_NaN());
      return;
    case Element::i8:
      std::memset(static_cast<int8_t*>(args.out) + first, args.out_zero_point, static_cast<size_t>(count));
      return;
    case Element::bf16:
      std::fill_n(static_cast<uint16_t*>(args.out) + first, count, uint16_t{0x7fc0});
      return;
    case Element::f16:
      std::fill_n(static_cast<uint16_t*>(args.out) + first, count, uint16_t{0x7e00});
  }
}

}  // namespace pycompress::int8_conv2d
