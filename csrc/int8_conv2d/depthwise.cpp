// One input and one output channel per group, on floats, where an instruction set has no products of bytes that add four (for those:
// depthwise_bytes.cpp). Quantised values are whole numbers in float32: their products are below 2^15 and
// a sum of up to 513 of them below 2^24, so fma adds them exactly, and float vectors hold as many numbers as int32 ones.
//
// channels_last: rows of pixels, channels in the lanes.
// NCHW: the same after transposing bytes, as for the GEMM, or, of few channels, one plane at a time, pixels in the lanes; for a stride
// the rows are split into phases, so that loads stay contiguous.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/scratch.h"
#include "int8_conv2d/layout.h"

namespace pycompress::int8_conv2d {
namespace {

constexpr int64_t kRowBytes = 128 * 1024;    // float rows of one block
constexpr int64_t kTransposedChannels = 16;  // of planes, from which on transposing pays (8: 84 us by planes, 100 by pixels)

struct Depthwise {
  const Kernel& kernel;
  const Args& a;
  const Shape& s;
  Sink sink;
  int64_t oh, ow, cols;  // cols: of a padded row
  float lo, hi;

  Depthwise(const Kernel& kernel_, const Args& args)
      : kernel(kernel_),
        a(args),
        s(args.shape),
        sink(kernel_, args),
        oh(args.shape.out_h()),
        ow(args.shape.out_w()),
        cols((ow - 1) * args.shape.stride_w + (args.shape.kw - 1) * args.shape.dilation_w + 1) {
    const int zero_point = a.dynamic ? 0 : a.x_zero_point;
    lo = static_cast<float>(a.quant_min - zero_point), hi = static_cast<float>(127 - zero_point);
  }

  int64_t window_h() const { return (s.kh - 1) * s.dilation_h + 1; }
  int64_t band_rows(int64_t out_rows) const { return (out_rows - 1) * s.stride_h + window_h(); }
  int64_t rows_per_block(int64_t row_floats) const {
    return std::clamp<int64_t>((kRowBytes / (row_floats * 4) - window_h()) / s.stride_h + 1, 1, oh);
  }

  // `count` elements from x on as whole numbers q - zero_point.
  void load(const char* x, int64_t count, const Image& image, float* dst, std::atomic<bool>* poisoned) const {
    if (a.x_type == Element::i8) {
      kernel.center_i8(x, count, a.x_zero_point, dst);
      return;
    }
    const float* f = reinterpret_cast<const float*>(x);
    if (a.x_type != Element::f32) {
      kernel.gemm->widen(x, static_cast<DType>(a.x_type), count, dst);
      f = dst;
    }
    if (std::isnan(kernel.round_row(f, count, image.inverse, lo, hi, dst))) poisoned->store(true, std::memory_order_relaxed);
  }
  const char* element(int64_t n, int64_t c, int64_t h, int64_t w) const {
    const int64_t size = a.x_type == Element::i8 ? 1 : a.x_type == Element::f32 ? 4 : 2;
    return static_cast<const char*>(a.x) + (n * a.x_stride[0] + c * a.x_stride[1] + h * a.x_stride[2] + w * a.x_stride[3]) * size;
  }
  const int8_t* weights() const { return static_cast<const int8_t*>(a.packed); }  // [taps][c]

  void planes(const Image* images, bool parallel, std::atomic<bool>* poisoned) const {
    const int64_t phases = s.stride_w, phase = round_up(ceil_div(cols, phases), 16) + 16, row = phases * phase;
    const int64_t rows = rows_per_block(row), per_plane = ceil_div(oh, rows);
    maybe_parallel(parallel, s.n * s.c * per_plane, [&](int64_t begin, int64_t end) {
      static thread_local Scratch band_memory, row_memory, tap_memory, out_memory;
      float* band = band_memory.get<float>(static_cast<size_t>(band_rows(rows) * row));
      float* whole = row_memory.get<float>(static_cast<size_t>(std::max(cols, s.w) + 16));
      const float** taps = tap_memory.get<const float*>(static_cast<size_t>(2 * s.taps()));
      float* w = reinterpret_cast<float*>(taps + s.taps());
      const int64_t ldo = round_up(ow, 16);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / per_plane / s.c, c = i / per_plane % s.c, y0 = i % per_plane * rows, y1 = std::min(oh, y0 + rows);
        const int64_t left = s.pad_w, count = std::clamp<int64_t>(cols - left, 0, s.w);
        for (int64_t r = 0; r < band_rows(y1 - y0); ++r) {
          const int64_t h = y0 * s.stride_h - s.pad_h + r;
          float* dst = band + r * row;
          if (h < 0 || h >= s.h || count == 0) {
            std::memset(dst, 0, static_cast<size_t>(row) * 4);
            continue;
          }
          float* line = phases == 1 ? dst : whole;
          std::memset(line, 0, static_cast<size_t>(left) * 4);
          load(element(n, c, h, 0), count, images[n], line + left, poisoned + n);
          std::memset(line + left + count, 0, static_cast<size_t>((phases == 1 ? row : cols) - left - count) * 4);
          if (phases > 1) kernel.split_phases(line, cols, phases, phase, dst);
        }
        for (int64_t t = 0; t < s.taps(); ++t) {
          const int64_t x = t % s.kw * s.dilation_w;
          taps[t] = band + t / s.kw * s.dilation_h * row + x % phases * phase + x / phases;
          w[t] = weights()[t * s.c + c];
        }
        float* y = out_memory.get<float>(static_cast<size_t>((y1 - y0) * ldo));
        kernel.depthwise_plane(taps, w, s.taps(), y1 - y0, ow, s.stride_h * row, images[n].scale * a.scale[c], a.bias ? a.bias[c] : 0.0f,
                               sink.inner, y, ldo);
        for (int64_t r = y0; r < y1; ++r) sink.store_run(y + (r - y0) * ldo, (n * s.o + c) * sink.plane + r * ow, ow);
      }
    });
  }

  // Input rows [h0, h0 + height) of image n as whole numbers, padding included.
  void load_pixels(int64_t n, int64_t h0, int64_t height, const Image& image, float* band, std::atomic<bool>* poisoned) const {
    const int64_t row = cols * s.c;
    if (!a.x_channels_last) {
      static thread_local Scratch operand_memory;
      const Gemm& gemm = *kernel.gemm;
      const int64_t stride = s.c * gemm.a_size, bytes = Band::row_bytes(cols, stride);
      char* operands = operand_memory.get<char>(static_cast<size_t>(height * bytes));
      fill_band(kernel, a, n, image, false, {operands, bytes, stride, h0, -s.pad_w, height, cols}, poisoned);
      const int correction = gemm.correction(a.dynamic ? 0 : a.x_zero_point);
      for (int64_t r = 0; r < height; ++r) kernel.center_operands(operands + r * bytes, row, correction, band + r * row);
      return;
    }
    const int64_t count = std::clamp<int64_t>(cols - s.pad_w, 0, s.w);
    for (int64_t r = 0; r < height; ++r) {
      const int64_t h = h0 + r;
      float *dst = band + r * row, *inside = dst + s.pad_w * s.c;
      if (h < 0 || h >= s.h || count == 0) {
        std::memset(dst, 0, static_cast<size_t>(row) * 4);
        continue;
      }
      std::memset(dst, 0, static_cast<size_t>(s.pad_w * s.c) * 4);
      if (a.x_stride[3] == s.c)
        load(element(n, 0, h, 0), count * s.c, image, inside, poisoned + n);
      else
        for (int64_t x = 0; x < count; ++x) load(element(n, 0, h, x), s.c, image, inside + x * s.c, poisoned + n);
      std::memset(inside + count * s.c, 0, static_cast<size_t>((cols - s.pad_w - count) * s.c) * 4);
    }
  }

  void pixels(const Image* images, bool parallel, std::atomic<bool>* poisoned) const {
    static thread_local Scratch weight_memory;
    float* w = weight_memory.get<float>(static_cast<size_t>(s.taps() * s.c));
    for (int64_t i = 0; i < s.taps() * s.c; ++i) w[i] = weights()[i];
    const int64_t row = cols * s.c, rows = std::max<int64_t>(1, std::min(rows_per_block(row), ceil_div(oh * s.n, 4 * num_threads())));
    const int64_t per_image = ceil_div(oh, rows);
    maybe_parallel(parallel, s.n * per_image, [&](int64_t begin, int64_t end) {
      static thread_local Scratch band_memory, tap_memory, out_memory;
      float* band = band_memory.get<float>(static_cast<size_t>(band_rows(rows) * row));
      const float** taps = tap_memory.get<const float*>(static_cast<size_t>(s.taps()));
      float* strip = out_memory.get<float>(static_cast<size_t>(round_up(ow, 16) * s.c + 16));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / per_image, y0 = i % per_image * rows, y1 = std::min(oh, y0 + rows);
        load_pixels(n, y0 * s.stride_h - s.pad_h, band_rows(y1 - y0), images[n], band, poisoned);
        for (int64_t y = y0; y < y1; ++y) {
          for (int64_t t = 0; t < s.taps(); ++t)
            taps[t] = band + ((y - y0) * s.stride_h + t / s.kw * s.dilation_h) * row + t % s.kw * s.dilation_w * s.c;
          float* out = sink.is_plain() ? sink.plain(n, y * ow, 0) : strip;
          kernel.depthwise_pixels(taps, w, s.taps(), ow, s.stride_w * s.c, s.c, images[n].scale, a.scale, a.bias, sink.inner, out);
          if (!sink.is_plain()) sink.store(n, y * ow, ow, 0, s.c, strip, s.c);
        }
      }
    });
  }
};

}  // namespace

void depthwise(const Kernel& kernel, const Args& a, const Image* images, bool parallel, std::atomic<bool>* poisoned) {
  const Depthwise job(kernel, a);
  // Work here is bandwidth and conversion rather than multiplication, so the threshold on it is lower.
  parallel = parallel || (num_threads() > 1 && a.shape.n * a.shape.c * a.shape.h * a.shape.w >= kSerialWork / 4);
  if (depthwise_bytes(kernel, a, images, parallel, poisoned)) return;
  if (a.x_channels_last || (a.shape.c >= kTransposedChannels))
    job.pixels(images, parallel, poisoned);
  else
    job.planes(images, parallel, poisoned);
}

}  // namespace pycompress::int8_conv2d
