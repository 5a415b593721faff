// Indirect GEMM: rows of a are pixels, given by one pointer per segment into a band of quantised rows.
#include <algorithm>
#include <vector>

#include "core/scratch.h"
#include "int8_conv2d/layout.h"
#include "int8_conv2d/tiles.h"

namespace pycompress::int8_conv2d {
namespace {

constexpr int64_t kBandBytes = 256 * 1024;  // half of a 512 KB L2; the rest is for weights and results
constexpr int64_t kStrip = 48;              // pixels that wait in L1 for being transposed; a multiple of every mr
constexpr int64_t kPixelsPerThread = 48;    // fewer than that, and the threads share the output channels instead

struct Direct {
  const Kernel& kernel;
  const Args& a;
  const Shape& s;
  const Gemm& gemm;
  Layout layout;
  Sink sink;
  int64_t ow, panels;  // panels of one merged group

  Direct(const Kernel& kernel_, const Args& args)
      : kernel(kernel_),
        a(args),
        s(args.shape),
        gemm(gemm_for(kernel_, args.shape)),
        layout(gemm, args.shape),
        sink(kernel_, args),
        ow(args.shape.out_w()),
        panels(ceil_div(layout.cols, gemm.nr)) {}

  // Whether pixels are encoded as rows of a linear layer.
  bool encodes() const { return gemm.encode_rows && s.pad_h == 0 && s.pad_w == 0; }

  int64_t pixel_stride() const {
    if (encodes()) {
      const int64_t row = round_up(s.c * gemm.a_size + gemm.row_extra, 64);
      return row % 1024 == 0 ? row + 64 : row;
    }
    const int64_t bytes = s.c * gemm.a_size;
    // Neighbouring pixels a multiple of 1 KB apart fall into few sets of L1. Kernel rows must stay contiguous, though.
    return bytes % 1024 == 0 && (s.kw == 1 || !layout.rows) ? bytes + 64 : bytes;
  }
  int64_t window_h() const { return (s.kh - 1) * s.dilation_h + 1; }
  int64_t band_cols() const { return (ow - 1) * s.stride_w + (s.kw - 1) * s.dilation_w + 1; }
  int64_t band_rows(int64_t out_rows) const { return (out_rows - 1) * s.stride_h + window_h(); }

  // Output rows [y0, y1) of image n.
  void block(int64_t n, int64_t y0, int64_t y1, const Image& image, bool parallel, std::atomic<bool>* poisoned) const {
    static thread_local Scratch band_memory, offset_memory;
    const int64_t stride = pixel_stride(), row = Band::row_bytes(band_cols(), stride), rows = band_rows(y1 - y0);
    const Band band{static_cast<char*>(band_memory.get(static_cast<size_t>(rows * row))),
                    row,
                    stride,
                    y0 * s.stride_h - s.pad_h,
                    -s.pad_w,
                    rows,
                    band_cols()};
    fill_band(kernel, a, n, image, parallel, band, poisoned);
    if (encodes()) encode(band, y1 - y0, parallel);
    const int64_t pixels = (y1 - y0) * ow;
    int64_t* offsets = offset_memory.get<int64_t>(static_cast<size_t>(pixels));
    for (int64_t p = 0; p < pixels; ++p) offsets[p] = p / ow * s.stride_h * row + p % ow * s.stride_w * stride;
    const int64_t items = layout.sets * panels, cuts = parallel && items < num_threads() ? num_threads() : 1;
    const int64_t step = round_up(ceil_div(pixels, cuts), kStrip);
    maybe_parallel(parallel, items * cuts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t p0 = i % cuts * step, p1 = std::min(pixels, p0 + step), set = i / cuts / panels, panel = i / cuts % panels;
        if (p0 < p1) compute(n, y0 * ow, band, offsets, p0, p1, set, panel * gemm.nr, image.scale);
      }
    });
  }

  void encode(const Band& band, int64_t rows, bool parallel) const {
    const bool beyond_int8 = !a.dynamic && a.x_zero_point != 0;
    maybe_parallel(parallel, rows, [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y)
        gemm.encode_rows(band.data + y * s.stride_h * band.row_stride, s.stride_w * band.pixel_stride, ow, s.c, beyond_int8);
    });
  }

  // The same as compute, of encoded pixels.
  void compute_encoded(int64_t n, int64_t first_pixel, const Band& band, const int64_t* offsets, int64_t p0, int64_t p1, const int8_t* b,
                       int64_t col, int64_t used, float image_scale) const {
    float scales[kStrip];
    const int32_t corrections[kStrip] = {};
    std::fill_n(scales, kStrip, image_scale);
    const bool late = sink.inner != Activation::none && sink.inner != Activation::relu, plain = sink.is_plain();
    const int8_matmul::Epilogue epilogue{scales,
                                         corrections,
                                         a.scale + col,
                                         a.bias ? a.bias + col : nullptr,
                                         weight_sums(a, layout) + col,
                                         late ? Activation::none : sink.inner};
    alignas(64) float strip[kStrip * int8_matmul::kMaxNr];
    const int64_t ld = plain ? s.o : int8_matmul::kMaxNr;
    int64_t count;
    for (int64_t p = p0; p < p1; p += count) {
      count = std::min({kStrip, p1 - p, ow - p % ow});  // pixels of one band row
      float* y = plain ? sink.plain(n, first_pixel + p, col) : strip;
      gemm.linear(band.data + offsets[p], s.stride_w * band.pixel_stride, count, layout.depth, b, static_cast<int>(used), epilogue, y, ld);
      if (late) gemm.activate(y, count, static_cast<int>(used), ld, sink.inner);
      if (!plain) sink.store(n, first_pixel + p, count, col, used, strip, ld);
    }
  }

  // rows[segment][r]: where the pixels at `offsets` begin.
  void point(const Band& band, const char* base, const int64_t* offsets, int height, const void** rows) const {
    for (int64_t t = 0, i = 0; t < layout.segments; ++t) {
      const int64_t ky = layout.rows ? t : t / s.kw, kx = layout.rows ? 0 : t % s.kw;
      const char* segment = base + ky * s.dilation_h * band.row_stride + kx * s.dilation_w * band.pixel_stride;
      for (int r = 0; r < height; ++r) rows[i++] = segment + offsets[r];
    }
  }

  // Whether the kernel's tiles can finish these results.
  bool finishes() const {
    return kernel.tiles && a.out_channels_last && kernel.tiles->takes(a.activation) && (a.out_type == Element::i8 || sink.is_plain()) &&
           (!a.residual || a.residual_type == Element::i8);
  }

  void compute_finished(int64_t n, int64_t first_pixel, const Band& band, const int64_t* offsets, int64_t p0, int64_t p1, int64_t set,
                        const int8_t* b, int64_t col, int64_t used, float image_scale) const {
    static thread_local Scratch pointer_memory;
    const void** rows = pointer_memory.get<const void*>(static_cast<size_t>(layout.segments * gemm.mr));
    Finish f{};
    const int32_t* sums = weight_sums(a, layout) + col;
    const int32_t correction = gemm.correction(a.dynamic ? 0 : a.x_zero_point);
    for (int64_t i = 0; i < used; ++i) {
      f.extra[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) * static_cast<uint32_t>(correction));
      f.scale[i] = image_scale * a.scale[col + i];
      f.bias[i] = a.bias ? a.bias[col + i] : 0.0f;
    }
    f.used = static_cast<int>(used), f.channels = s.o, f.activation = a.activation;
    f.bytes = a.out_type == Element::i8, f.inverse = sink.out_inverse, f.zero_point = a.out_zero_point, f.lowest = a.out_min;
    f.add = a.residual, f.residual_scale = a.residual_scale, f.residual_zero_point = a.residual_zero_point;
    const char* base = band.data + set * layout.channels * gemm.a_size;
    int64_t at = (n * sink.plane + first_pixel + p0) * s.o + col;
    int height;
    for (int64_t p = p0; p < p1; p += height, at += height * s.o) {
      height = int8_matmul::next_rows(p1 - p);
      point(band, base, offsets + p, height, rows);
      kernel.tiles->tile(rows, height, static_cast<int>(layout.segments), layout.depth, b, f,
                         static_cast<char*>(a.out) + at * (f.bytes ? 1 : 4), f.add ? static_cast<const int8_t*>(a.residual) + at : nullptr);
    }
  }

  // Pixels [p0, p1) of a block, one panel of columns.
  void compute(int64_t n, int64_t first_pixel, const Band& band, const int64_t* offsets, int64_t p0, int64_t p1, int64_t set, int64_t j,
               float image_scale) const {
    static thread_local Scratch pointer_memory, wide_memory;
    const void** rows = pointer_memory.get<const void*>(static_cast<size_t>(layout.segments * gemm.mr));
    const int64_t k = layout.k(), used = std::min<int64_t>(gemm.nr, layout.cols - j), cols = round_up(used, gemm.nv);
    const int8_t* b = static_cast<const int8_t*>(a.packed) + set * layout.set_bytes + j * k;
    const int64_t col = set * layout.cols + j;
    if (encodes()) return compute_encoded(n, first_pixel, band, offsets, p0, p1, b, col, used, image_scale);
    if (finishes()) return compute_finished(n, first_pixel, band, offsets, p0, p1, set, b, col, used, image_scale);
    void* wide = nullptr;
    if (gemm.widen_panel && p1 - p0 >= int8_matmul::kWidenRows) {
      wide = wide_memory.get<int16_t>(static_cast<size_t>(k * cols));
      gemm.widen_panel(b, k * cols, wide);
    }
    float scales[int8_matmul::kMaxMr];
    int32_t corrections[int8_matmul::kMaxMr];
    for (int r = 0; r < gemm.mr; ++r) {
      scales[r] = image_scale;
      corrections[r] = gemm.correction(a.dynamic ? 0 : a.x_zero_point);
    }
    const int8_matmul::Epilogue epilogue{
        scales, corrections, a.scale + col, a.bias ? a.bias + col : nullptr, weight_sums(a, layout) + col, sink.inner};
    const char* base = band.data + set * layout.channels * gemm.a_size;
    alignas(64) int32_t acc[int8_matmul::kMaxMr * int8_matmul::kMaxNr];
    alignas(64) float strip[kStrip * int8_matmul::kMaxNr];
    const bool plain = sink.is_plain();
    const int64_t ld = plain ? s.o : int8_matmul::kMaxNr;
    for (int64_t p = p0; p < p1; p += kStrip) {
      const int64_t count = std::min(kStrip, p1 - p);
      float* y = plain ? sink.plain(n, first_pixel + p, col) : strip;
      for (int64_t m = 0; m < count; m += gemm.mr) {
        const int height = static_cast<int>(std::min<int64_t>(gemm.mr, count - m));
        point(band, base, offsets + p + m, height, rows);
        if (wide)
          gemm.tile_wide(rows, height, static_cast<int>(layout.segments), layout.depth, wide, static_cast<int>(cols), acc);
        else
          gemm.tile(rows, height, static_cast<int>(layout.segments), layout.depth, b, static_cast<int>(cols), acc);
        gemm.store_f32(acc, height, static_cast<int>(used), epilogue, y + m * ld, ld);
      }
      if (!plain) sink.store(n, first_pixel + p, count, col, used, strip, ld);
    }
  }
};

}  // namespace

void direct(const Kernel& kernel, const Args& a, const Image* images, bool parallel, std::atomic<bool>* poisoned) {
  const Direct job(kernel, a);
  const Shape& s = a.shape;
  const int64_t oh = s.out_h(), row = Band::row_bytes(job.band_cols(), job.pixel_stride());
  // Output rows per block: what the band may take, and few enough that every thread has blocks.
  int64_t rows = std::clamp<int64_t>((kBandBytes / row - job.window_h()) / s.stride_h + 1, 1, oh);
  const int64_t threads = parallel ? num_threads() : 1;
  const bool split = threads > 1 && s.n * oh * job.ow >= threads * kPixelsPerThread && s.n * oh >= threads;
  if (split) rows = std::min(rows, ceil_div(oh, ceil_div(threads, s.n)));
  const int64_t per_image = ceil_div(oh, rows), blocks = s.n * per_image;
  rows = ceil_div(oh, per_image);
  maybe_parallel(split, blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / per_image, y0 = i % per_image * rows, y1 = std::min(oh, y0 + rows);
      if (y0 < y1) job.block(n, y0, y1, images[n], parallel && !split, poisoned);
    }
  });
}

}  // namespace pycompress::int8_conv2d
