// The input side: the scale of each image, and bands of quantised rows.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/scratch.h"
#include "int8_conv2d/layout.h"

namespace pycompress::int8_conv2d {
namespace {

constexpr float kLargest = 3.402823466e38f;
constexpr int64_t kGroupBytes = 16 * 1024;
constexpr int64_t kPiece = 32 * 1024;  // elements of one piece of work when an image is measured

const char* element(const Args& a, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t size = a.x_type == Element::i8 ? 1 : a.x_type == Element::f32 ? 4 : 2;
  return static_cast<const char*>(a.x) + (n * a.x_stride[0] + c * a.x_stride[1] + h * a.x_stride[2] + w * a.x_stride[3]) * size;
}

// A run of elements as float32: x itself, or widened into `wide`.
const float* as_float(const Kernel& kernel, const Args& a, const char* x, int64_t count, float* wide) {
  if (a.x_type == Element::f32) return reinterpret_cast<const float*>(x);
  kernel.gemm->widen(x, static_cast<DType>(a.x_type), count, wide);
  return wide;
}

// An image as contiguous runs in memory.
struct Runs {
  int64_t outer, inner, length;  // outer * inner runs
  int64_t outer_stride, inner_stride;
  Runs(const Args& a) {
    const Shape& s = a.shape;
    const int64_t pixels = a.x_channels_last ? s.c : 1, w_run = s.w * pixels;
    if (a.x_channels_last && a.x_stride[3] != s.c) {
      outer = s.h, inner = s.w, length = s.c, outer_stride = a.x_stride[2], inner_stride = a.x_stride[3];
    } else {
      outer = a.x_channels_last ? 1 : s.c, inner = s.h, length = w_run, outer_stride = a.x_stride[1], inner_stride = a.x_stride[2];
    }
    if (inner == 1 || inner_stride == length) length *= inner, inner = 1;
    if (inner == 1 && (outer == 1 || outer_stride == length)) length *= outer, outer = 1;
    if (outer * inner == 1) {  // cut into pieces
      inner = ceil_div(length, kPiece), inner_stride = kPiece, outer_stride = 0;
      total = length, length = kPiece;
    }
  }
  int64_t total = 0;  // elements, if it was cut
  int64_t size(int64_t i) const { return total ? std::min(length, total - i * length) : length; }
};

bool bands_cover(const Shape& s) {
  const auto covered = [](int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t window = (kernel - 1) * dilation + 1;
    return stride <= window && (out - 1) * stride + window - pad >= size;
  };
  return covered(s.h, s.out_h(), s.kh, s.stride_h, s.pad_h, s.dilation_h) &&
         covered(s.w, s.out_w(), s.kw, s.stride_w, s.pad_w, s.dilation_w);
}

}  // namespace

void measure_images(const Kernel& kernel, const Args& a, bool parallel, Image* images, std::atomic<bool>* poisoned) {
  const Shape& s = a.shape;
  const float inverse = a.dynamic ? 0.0f : 1.0f / a.x_scale;
  for (int64_t n = 0; n < s.n; ++n) images[n] = {a.dynamic ? 0.0f : a.x_scale, inverse};
  if (a.x_type == Element::i8 || (!a.dynamic && bands_cover(s))) return;
  const Runs runs(a);
  const int64_t per_image = runs.outer * runs.inner;
  std::vector<std::atomic<uint32_t>> top(static_cast<size_t>(s.n));  // bits of max|x|: ordered like the numbers, NaN on top
  maybe_parallel(parallel, s.n * per_image, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* wide = a.x_type == Element::f32 ? nullptr : scratch.get<float>(static_cast<size_t>(runs.length));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / per_image, r = i % per_image, outer = r / runs.inner, inner = r % runs.inner;
      const char* x = element(a, n, 0, 0, 0) + (outer * runs.outer_stride + inner * runs.inner_stride) * (a.x_type == Element::f32 ? 4 : 2);
      const float amax = kernel.gemm->amax(as_float(kernel, a, x, runs.size(inner), wide), runs.size(inner));
      uint32_t bits, seen = top[static_cast<size_t>(n)].load(std::memory_order_relaxed);
      std::memcpy(&bits, &amax, 4);
      while (bits > seen && !top[static_cast<size_t>(n)].compare_exchange_weak(seen, bits, std::memory_order_relaxed)) {
      }
    }
  });
  for (int64_t n = 0; n < s.n; ++n) {
    const uint32_t bits = top[static_cast<size_t>(n)];
    float amax;
    std::memcpy(&amax, &bits, 4);
    if (!(amax <= kLargest)) poisoned[n] = true;
    if (!a.dynamic) continue;
    // The same arithmetic as pycompress/ops/affine.py: symmetric_scale, inverse_scale.
    const float scale = !(amax <= kLargest) ? NAN : amax < 0x1p-100f ? 0.0f : amax / 127.0f;
    images[n] = {scale, scale > 0.0f ? 1.0f / scale : 0.0f};
  }
}

void fill_band(const Kernel& kernel, const Args& a, int64_t n, const Image& image, bool parallel, const Band& band,
               std::atomic<bool>* poisoned) {
  const Shape& s = a.shape;
  const Gemm& gemm = *kernel.gemm;
  const int zero_point = a.dynamic ? 0 : a.x_zero_point, nothing = gemm.correction(zero_point);  // the operand of real zero, in every byte
  const int64_t left = std::max<int64_t>(band.first_col, 0), right = std::min(band.first_col + band.cols, s.w), count = right - left;
  const bool joined = a.x_channels_last && a.x_stride[3] == s.c && band.pixel_stride == s.c * gemm.a_size;
  // Rows are done in groups: a few hundred bytes of every plane at a time, into a part of the band that stays in L1.
  const int64_t group = std::max<int64_t>(1, kGroupBytes / band.row_stride);
  maybe_parallel(parallel, ceil_div(band.rows, group), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t g = begin * group; g < std::min(band.rows, end * group);) {
      const int64_t h = band.first_row + g;
      char* row = band.data + g * band.row_stride;
      if (h < 0 || h >= s.h || count <= 0) {
        std::memset(row, nothing, static_cast<size_t>(band.cols * band.pixel_stride));
        ++g;
        continue;
      }
      const int64_t rows = std::min({group - g % group, band.rows - g, s.h - h});
      char* dst = row + (left - band.first_col) * band.pixel_stride;
      float bad = 0.0f;
      if (!a.x_channels_last) {
        const float* x = reinterpret_cast<const float*>(element(a, n, 0, h, left));
        int64_t plane = a.x_stride[1], line = a.x_stride[2];
        if (a.x_type != Element::f32) {
          float* wide = scratch.get<float>(static_cast<size_t>(s.c * rows * count));
          for (int64_t c = 0; c < s.c; ++c)
            for (int64_t y = 0; y < rows; ++y) as_float(kernel, a, element(a, n, c, h + y, left), count, wide + (c * rows + y) * count);
          x = wide, line = count, plane = rows * count;
        }
        bad = kernel.quantize_planes(x, plane, line, s.c, rows, count, image.inverse, zero_point, a.quant_min, dst, band.row_stride,
                                     band.pixel_stride);
      } else {
        const int64_t pixels = joined ? 1 : count, length = joined ? count * s.c : s.c;
        float* wide = a.x_type == Element::f32 ? nullptr : scratch.get<float>(static_cast<size_t>(length));
        for (int64_t y = 0; y < rows; ++y)
          for (int64_t p = 0; p < pixels; ++p) {
            const char* x = element(a, n, 0, h + y, left + p);
            char* d = dst + y * band.row_stride + p * band.pixel_stride;
            if (a.x_type == Element::i8) {
              gemm.load_row(reinterpret_cast<const int8_t*>(x), length, length, zero_point, d);
              continue;
            }
            const float* f = as_float(kernel, a, x, length, wide);
            if (!a.dynamic && !(gemm.amax(f, length) <= kLargest)) bad = NAN;
            gemm.quantize_row(f, length, length, image.inverse, zero_point, a.quant_min, d);
          }
      }
      if (!a.dynamic && std::isnan(bad)) poisoned[n].store(true, std::memory_order_relaxed);
      for (int64_t y = 0; y < rows; ++y) {  // after the pixels: the last one may have been written past its end
        char* line = row + y * band.row_stride;
        std::memset(line, nothing, static_cast<size_t>(dst - row));
        std::memset(line + (dst - row) + count * band.pixel_stride, nothing,
                    static_cast<size_t>((band.first_col + band.cols - right) * band.pixel_stride));
      }
      g += rows;
    }
  });
}

}  // namespace pycompress::int8_conv2d
