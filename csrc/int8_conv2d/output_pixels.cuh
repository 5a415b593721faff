// The output pixels of all images as rows, and where in q the window of each begins.
#pragma once
#include "core/cuda/divide.cuh"
#include "int8_conv2d/int8_conv2d_cuda.h"

namespace pycompress::int8_conv2d {

// Added to a coordinate (they stay below 2^28, see ops/cuda/int8_conv2d.py), twice at most: no pixel of any image.
constexpr int kOutside = -(1 << 29);

struct OutputPixels {
  const int8_t* q;
  int64_t image_stride;
  uint32_t row_stride, pixel_stride;  // an image has less than 2^31 bytes: places in it are 32-bit, modulo 2^32 while they are outside
  int h, w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int rows;
  cuda::Divider plane, out_w;

  explicit OutputPixels(const ConvArgs& a)
      : q(a.q),
        image_stride(a.image_stride),
        row_stride(static_cast<uint32_t>(a.row_stride)),
        pixel_stride(static_cast<uint32_t>(a.pixel_stride)),
        h(static_cast<int>(a.shape.h)),
        w(static_cast<int>(a.shape.w)),
        stride_h(static_cast<int>(a.shape.stride_h)),
        stride_w(static_cast<int>(a.shape.stride_w)),
        pad_h(static_cast<int>(a.shape.pad_h)),
        pad_w(static_cast<int>(a.shape.pad_w)),
        dilation_h(static_cast<int>(a.shape.dilation_h)),
        dilation_w(static_cast<int>(a.shape.dilation_w)),
        rows(static_cast<int>(a.shape.n * a.out_h * a.out_w)),
        plane(a.out_h * a.out_w),
        out_w(a.out_w) {}

  // The image, the pixel in it, and the first tap of its window in the input; y is outside for rows behind the last.
  __device__ __forceinline__ void locate(int row, int& image, int& pixel, int& y, int& x) const {
    image = plane.divide(row < rows ? row : 0, pixel);
    y = out_w.divide(pixel, x) * stride_h - pad_h;
    x = x * stride_w - pad_w;
    if (row >= rows) y = kOutside;
  }
  __device__ __forceinline__ const int8_t* image(int index) const { return q + index * image_stride; }
  __device__ __forceinline__ uint32_t place(int y, int x) const {
    return static_cast<uint32_t>(y) * row_stride + static_cast<uint32_t>(x) * pixel_stride;
  }
  __device__ __forceinline__ bool inside(int y, int x) const {
    return static_cast<unsigned>(y) < static_cast<unsigned>(h) && static_cast<unsigned>(x) < static_cast<unsigned>(w);
  }
};

}  // namespace pycompress::int8_conv2d
