// One input and one output channel per group, on bytes: a dword of operands holds four neighbouring taps of one channel, so that a
// kernel row of up to four taps is one product of an instruction that adds four.
//
// NCHW: planes of bytes, pixels in the lanes, taps gathered in registers (planes.h). channels_last: channels in the lanes, taps
// interleaved in registers (pixels.h). Nothing is transposed in memory and no number becomes a float before its sum is complete.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/scratch.h"
#include "int8_conv2d/layout.h"
#include "int8_conv2d/pixels.h"
#include "int8_conv2d/planes.h"

namespace pycompress::int8_conv2d {
namespace {

constexpr int64_t kPlaneBytes = 16 * 1024;   // of operands and results of one block of a plane, in L1
constexpr int64_t kPixelBytes = 128 * 1024;  // of operands of one block of pixels

struct DepthwiseBytes {
  const Kernel& kernel;
  const Args& a;
  const Shape& s;
  Sink sink;
  int64_t oh, ow, cols, parts;  // cols of a padded row, dwords of a kernel row
  int zero_point, correction;

  DepthwiseBytes(const Kernel& kernel_, const Args& args)
      : kernel(kernel_),
        a(args),
        s(args.shape),
        sink(kernel_, args),
        oh(args.shape.out_h()),
        ow(args.shape.out_w()),
        cols((ow - 1) * args.shape.stride_w + (args.shape.kw - 1) * args.shape.dilation_w + 1),
        parts(ceil_div(args.shape.kw, 4)),
        zero_point(args.dynamic ? 0 : args.x_zero_point),
        correction(kernel_.gemm->correction(zero_point)) {}

  int64_t window_h() const { return (s.kh - 1) * s.dilation_h + 1; }
  int64_t band_rows(int64_t out_rows) const { return (out_rows - 1) * s.stride_h + window_h(); }
  const char* element(int64_t n, int64_t c, int64_t h, int64_t w) const {
    const int64_t size = a.x_type == Element::i8 ? 1 : a.x_type == Element::f32 ? 4 : 2;
    return static_cast<const char*>(a.x) + (n * a.x_stride[0] + c * a.x_stride[1] + h * a.x_stride[2] + w * a.x_stride[3]) * size;
  }

  // Weights as dwords [kernel row][part][channel], `step` channels apart, and what the sums of operands hold too much.
  void tap_weights(int32_t* w, int32_t* offsets, int64_t step) const {
    std::memset(w, 0, static_cast<size_t>(s.kh * parts * step) * 4);
    std::memset(offsets, 0, static_cast<size_t>(step) * 4);
    for (int64_t k = 0; k < s.kh; ++k)
      for (int64_t x = 0; x < s.kw; ++x) {
        const int8_t* row = static_cast<const int8_t*>(a.packed) + (k * s.kw + x) * s.c;
        int32_t* dst = w + (k * parts + x / 4) * step;
        const int shift = static_cast<int>(x % 4) * 8;
        for (int64_t c = 0; c < s.c; ++c) {
          dst[c] |= static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint8_t>(row[c])) << shift);
          offsets[c] += row[c] * correction;
        }
      }
  }

  // Planes as bytes, taps gathered out of them in registers: no transposition, no floats in between.
  void planes(const Image* images, bool parallel, std::atomic<bool>* poisoned) const {
    std::vector<uint64_t> inside(static_cast<size_t>(Taps::inside_size(s, ow)));
    const Taps taps(s, ow, correction, inside.data());
    const int64_t before = taps.before(), behind = taps.behind(ow), plane = s.h * s.w;
    const int64_t rows = std::clamp<int64_t>((kPlaneBytes / (s.w + 4 * ow) - window_h()) / s.stride_h + 1, 1, oh),
                  cuts = ceil_div(oh, rows);
    // Small planes are quantised several at a time: what was just stored is not yet to be loaded.
    const int64_t group = cuts > 1 ? 1 : std::clamp<int64_t>(kPlaneBytes / 4 / plane, 1, s.c), groups = ceil_div(s.c, group);
    static thread_local Scratch weight_memory;
    int32_t *w = weight_memory.get<int32_t>(static_cast<size_t>((s.kh * taps.parts + 1) * s.c)), *offsets = w + s.kh * taps.parts * s.c;
    tap_weights(w, offsets, s.c);
    maybe_parallel(parallel, s.n * groups * cuts, [&](int64_t begin, int64_t end) {
      static thread_local Scratch byte_memory, wide_memory, out_memory;
      const int64_t most = cuts > 1 ? std::min(band_rows(rows), s.h) * s.w : plane;
      char* bytes = byte_memory.get<char>(static_cast<size_t>(before + group * most + behind + 64)) + before;
      float* wide = a.x_type == Element::f32 ? nullptr : wide_memory.get<float>(static_cast<size_t>(group * most));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / (groups * cuts), c0 = i / cuts % groups * group, c1 = std::min(s.c, c0 + group), y0 = i % cuts * rows,
                      y1 = std::min(oh, y0 + rows);
        const int64_t h0 = std::clamp<int64_t>(y0 * s.stride_h - s.pad_h, 0, s.h),
                      h1 = std::clamp<int64_t>(y0 * s.stride_h - s.pad_h + band_rows(y1 - y0), h0, s.h), pixels = (h1 - h0) * s.w;
        // As few runs as memory allows: all planes, a plane, or a row.
        const bool rows_joined = a.x_stride[2] == s.w, joined = rows_joined && pixels == plane && a.x_stride[1] == plane;
        for (int64_t c = c0; c < c1; c = joined ? c1 : c + 1)
          for (int64_t h = h0; h < h1; h = rows_joined ? h1 : h + 1) {
            const int64_t count = joined ? (c1 - c0) * pixels : rows_joined ? pixels : s.w;
            const char* x = element(n, c, h, 0);
            const float* f = reinterpret_cast<const float*>(x);
            if (wide) kernel.gemm->widen(x, static_cast<DType>(a.x_type), count, wide), f = wide;
            const float bad = kernel.planes->quantize_bytes(f, count, images[n].inverse, zero_point, a.quant_min,
                                                            bytes + (c - c0) * pixels + (h - h0) * s.w);
            if (!a.dynamic && std::isnan(bad)) poisoned[n].store(true, std::memory_order_relaxed);
          }
        const bool straight = a.out_type == Element::f32 && !a.residual;
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t first = (n * s.o + c) * sink.plane;
          float* out =
              straight ? static_cast<float*>(a.out) + first + y0 * ow : out_memory.get<float>(static_cast<size_t>((y1 - y0) * ow + 16));
          kernel.planes->depthwise({bytes + (c - c0) * pixels - h0 * s.w, &taps, s.h, s.kh, s.stride_h, s.dilation_h, s.pad_h, w + c, s.c,
                                    offsets[c], images[n].scale * a.scale[c], a.bias ? a.bias[c] : 0.0f, sink.inner, y0, y1, ow, out, ow});
          if (!straight) sink.store_run(out, first + y0 * ow, (y1 - y0) * ow);
        }
      }
    });
  }

  // Rows of pixels as bytes, in blocks of 64 channels.
  void pixels(const Image* images, bool parallel, std::atomic<bool>* poisoned) const {
    const int64_t channels = round_up(s.c, 64), blocks = channels / 64, row = cols * 64;
    static thread_local Scratch weight_memory;
    int32_t *w = weight_memory.get<int32_t>(static_cast<size_t>((s.kh * parts + 1) * channels)), *offsets = w + s.kh * parts * channels;
    tap_weights(w, offsets, channels);
    const int64_t fit = std::clamp<int64_t>((kPixelBytes / (row * blocks) - window_h()) / s.stride_h + 1, 1, oh),
                  rows = ceil_div(oh, std::max(ceil_div(oh, fit), parallel ? std::min(oh, ceil_div(4 * num_threads(), s.n)) : 1)),
                  per_image = ceil_div(oh, rows), block_step = band_rows(rows) * row;
    maybe_parallel(parallel, s.n * per_image, [&](int64_t begin, int64_t end) {
      static thread_local Scratch byte_memory, wide_memory, out_memory;
      char* bytes = byte_memory.get<char>(static_cast<size_t>(blocks * block_step));
      float* strip = sink.is_plain() ? nullptr : out_memory.get<float>(static_cast<size_t>(round_up(rows * ow, 16) * 64));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / per_image, y0 = i % per_image * rows, y1 = std::min(oh, y0 + rows);
        const int64_t count = std::clamp<int64_t>(cols - s.pad_w, 0, s.w), left = std::min(s.pad_w, cols), right = cols - left - count;
        float bad = 0.0f;
        for (int64_t r = 0; r < band_rows(y1 - y0); ++r) {
          const int64_t h = y0 * s.stride_h - s.pad_h + r;
          const bool inside = h >= 0 && h < s.h && count > 0;
          for (int64_t b = 0; b < blocks; ++b) {
            char* line = bytes + b * block_step + r * row;
            std::memset(line, correction, static_cast<size_t>((inside ? left : cols) * 64));
            if (inside) std::memset(line + (left + count) * 64, correction, static_cast<size_t>(right * 64));
          }
          if (inside) bad += load(n, h, count, images[n], wide_memory, bytes + r * row + left * 64, block_step);
        }
        if (!a.dynamic && std::isnan(bad)) poisoned[n].store(true, std::memory_order_relaxed);
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t c = b * 64, used = std::min<int64_t>(64, s.c - c);
          kernel.pixels->depthwise({bytes + b * block_step,
                                    row,
                                    s.kh,
                                    s.kw,
                                    s.stride_h,
                                    s.stride_w,
                                    s.dilation_h,
                                    s.dilation_w,
                                    w + c,
                                    channels,
                                    offsets + c,
                                    images[n].scale,
                                    a.scale + c,
                                    a.bias ? a.bias + c : nullptr,
                                    sink.inner,
                                    y1 - y0,
                                    ow,
                                    used,
                                    strip ? strip : sink.plain(n, y0 * ow, c),
                                    ow * (strip ? 64 : s.o),
                                    strip ? 64 : s.o});
          if (strip) sink.store(n, y0 * ow, (y1 - y0) * ow, c, used, strip, 64);
        }
      }
    });
  }

  // `count` pixels of an input row to blocks of bytes.
  float load(int64_t n, int64_t h, int64_t count, const Image& image, Scratch& wide_memory, char* dst, int64_t block_step) const {
    const int64_t step = a.x_stride[3];
    if (a.x_type == Element::i8) {
      kernel.pixels->load(reinterpret_cast<const int8_t*>(element(n, 0, h, 0)), step, s.c, count, dst, block_step);
      return 0.0f;
    }
    if (a.x_type == Element::f32)
      return kernel.pixels->quantize(reinterpret_cast<const float*>(element(n, 0, h, 0)), step, s.c, count, image.inverse, zero_point,
                                     a.quant_min, dst, block_step);
    float* wide = wide_memory.get<float>(static_cast<size_t>(count * s.c));
    for (int64_t p = 0; p < (step == s.c ? 1 : count); ++p)
      kernel.gemm->widen(element(n, 0, h, p), static_cast<DType>(a.x_type), step == s.c ? count * s.c : s.c, wide + p * s.c);
    return kernel.pixels->quantize(wide, s.c, s.c, count, image.inverse, zero_point, a.quant_min, dst, block_step);
  }
};

}  // namespace

bool depthwise_bytes(const Kernel& kernel, const Args& a, const Image* images, bool parallel, std::atomic<bool>* poisoned) {
  if (a.x_channels_last ? !kernel.pixels || !kernel.pixels->depthwise : !kernel.planes || !Taps::fit(a.shape)) return false;
  const DepthwiseBytes job(kernel, a);
  if (a.x_channels_last)
    job.pixels(images, parallel, poisoned);
  else
    job.planes(images, parallel, poisoned);
  return true;
}

}  // namespace pycompress::int8_conv2d
