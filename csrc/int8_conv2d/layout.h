// How weights lie in memory, and what the algorithms of this op share. Private to csrc/int8_conv2d.
#pragma once
#include <atomic>

#include "core/parallel.h"
#include "int8_conv2d/int8_conv2d.h"

namespace pycompress::int8_conv2d {

// The GEMM view of the weights. Where the pixels of one kernel row lie side by side (dilation_w = 1, one group), a
// segment is a whole kernel row of kw * C elements; else it is one tap. Small groups are merged into one that fills a vector:
// the zeros between them cost nothing that the empty columns would not cost too.
struct Layout {
  bool rows;         // a segment is a whole kernel row
  int64_t merged;    // groups per merged group
  int64_t sets;      // merged groups
  int64_t cols;      // output channels of one
  int64_t channels;  // input channels of one
  int64_t segments;  // per row of a
  int64_t length;    // elements of a segment
  int64_t depth;     // the same, padded to a multiple of kr
  int64_t set_bytes;

  Layout(const Gemm& gemm, const Shape& s) {
    const int64_t group_cols = s.o / s.groups;
    merged = 1;
    for (int64_t m = 2; m <= s.groups && group_cols * m <= gemm.nv; ++m)
      if (s.groups % m == 0) merged = m;
    sets = s.groups / merged, cols = group_cols * merged, channels = s.c / s.groups * merged;
    rows = sets == 1 && s.dilation_w == 1;
    segments = rows ? s.kh : s.taps();
    length = rows ? s.kw * channels : channels;
    depth = round_up(length, gemm.kr);
    set_bytes = round_up(static_cast<int64_t>(int8_matmul::packed_bytes(gemm, cols, segments * depth)), 64);
  }
  int64_t k() const { return segments * depth; }
  // Position of tap t and input channel c in the depth of the GEMM.
  int64_t position(const Shape& s, int64_t t, int64_t c) const { return rows ? t / s.kw * depth + t % s.kw * channels + c : t * depth + c; }
};

// The GEMM of a layer. A pixel of a 1x1 layer is a row of a linear layer, and may be encoded as one (Gemm::encode_rows), which takes 0.5 to
// 0.8 cycles per input channel and saves about 0.01 per input and output channel.
inline const Gemm& gemm_for(const Kernel& kernel, const Shape& s) {
  const bool encodes = kernel.encoding && s.taps() == 1 && s.groups == 1 && s.c % 4 == 0 && s.c >= int8_matmul::kShallow && s.o >= 128;
  return encodes ? *kernel.encoding : *kernel.gemm;
}

// Taps up to which 255 * 128 * taps stays below 2^24, so that float32 sums of whole numbers are exact.
inline constexpr int64_t kMaxDepthwiseTaps = 513;
inline bool is_depthwise(const Shape& s) { return s.groups == s.c && s.o == s.c && s.groups > 1 && s.taps() <= kMaxDepthwiseTaps; }

inline const int32_t* weight_sums(const Args& a, const Layout& layout) {
  return reinterpret_cast<const int32_t*>(static_cast<const char*>(a.packed) + layout.sets * layout.set_bytes);
}
inline const int32_t* weight_magnitudes(const Args& a, const Layout& layout) { return weight_sums(a, layout) + a.shape.o; }

// Work below which waking another thread costs more than it saves (about 5 us).
inline constexpr int64_t kSerialWork = 256 * 1024;

// Width of an image that 1x1 convolutions aim at: a few tiles.
inline constexpr int64_t kJoinedPixels = 64;

template <class Body>
void maybe_parallel(bool parallel, int64_t count, Body&& body) {
  if (parallel)
    parallel_for(count, body);
  else if (count > 0)
    body(int64_t{0}, count);
}

// What quantisation knows about each image.
struct Image {
  float scale, inverse;  // inverse = 0 quantises to the zero point
};
// Sets images[n], and poisoned[n] where an image holds NaN or Inf that filling bands would not meet.
void measure_images(const Kernel& kernel, const Args& args, bool parallel, Image* images, std::atomic<bool>* poisoned);

// Quantised rows of one image in operand format, NHWC, padding included.
struct Band {
  char* data;
  int64_t row_stride, pixel_stride;  // bytes
  int64_t first_row, first_col;      // input coordinates of the corner, negative in the padding
  int64_t rows, cols;

  // 64 bytes of slack: the last pixel of a row is written by whole vectors, and read by whole kr.
  static int64_t row_bytes(int64_t cols, int64_t pixel_stride) { return round_up(cols * pixel_stride + 64, 64); }
};
// Sets poisoned[n] if a static image holds NaN or Inf.
void fill_band(const Kernel& kernel, const Args& args, int64_t n, const Image& image, bool parallel, const Band& band,
               std::atomic<bool>* poisoned);

// Where finished float results go.
struct Sink {
  const Kernel& kernel;
  const Args& args;
  int64_t plane;
  Activation inner, outer;  // what the tile applies, and what is left for after the residual
  float out_inverse;

  Sink(const Kernel& kernel, const Args& args);
  // float32 channels_last without a residual: tiles write straight to the result.
  bool is_plain() const { return args.out_channels_last && args.out_type == Element::f32 && !args.residual; }
  float* plain(int64_t n, int64_t pixel, int64_t col) const {
    return static_cast<float*>(args.out) + (n * plane + pixel) * args.shape.o + col;
  }
  // `count` pixels of image n from flat output pixel `pixel` on, channels [col, col + cols); y has row stride ld, may be
  // changed, and is readable up to the next multiples of 16 in both directions.
  void store(int64_t n, int64_t pixel, int64_t count, int64_t col, int64_t cols, float* y, int64_t ld) const;
  // The elementwise end of a contiguous run of the result: residual, activation, element type.
  void store_run(float* y, int64_t offset, int64_t count) const;
  void poison(int64_t n) const;
};

void direct(const Kernel& kernel, const Args& args, const Image* images, bool parallel, std::atomic<bool>* poisoned);
void winograd(const Kernel& kernel, const Args& args, const Image* images, bool parallel, std::atomic<bool>* poisoned);
void depthwise(const Kernel& kernel, const Args& args, const Image* images, bool parallel, std::atomic<bool>* poisoned);
// False where the kernel has no such way.
bool depthwise_bytes(const Kernel& kernel, const Args& args, const Image* images, bool parallel, std::atomic<bool>* poisoned);
void planes(const Kernel& kernel, const Args& args, const Image* images, bool parallel, std::atomic<bool>* poisoned);
bool planes_apply(const Kernel& kernel, const Args& args);
bool planes_pay(const Kernel& kernel, const Args& args);
void grouped(const Kernel& kernel, const Args& args, const Image* images, bool parallel, std::atomic<bool>* poisoned);
bool grouped_applies(const Kernel& kernel, const Args& args);
bool grouped_pays(const Kernel& kernel, const Args& args);
bool winograd_applies(const Kernel& kernel, const Args& args);
bool winograd_pays(const Kernel& kernel, const Args& args);

}  // namespace pycompress::int8_conv2d
