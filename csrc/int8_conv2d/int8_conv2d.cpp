#include "int8_conv2d/int8_conv2d.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "int8_conv2d/layout.h"

namespace pycompress::int8_conv2d {

extern const Kernel kScalar;
#if PC_X86
extern const Kernel kAvx2;
extern const Kernel kAvx512Vnni, kAvx512Vnni256;
#if PC_HAVE_AVX_VNNI
extern const Kernel kAvxVnni;
#endif
#elif PC_ARM64
extern const Kernel kNeon;
#if PC_HAVE_NEON_EXTENSIONS
extern const Kernel kNeonDotprod;
extern const Kernel kNeonI8mm;
#endif
#endif

const KernelList<Kernel>& kernels() {
  static const KernelList<Kernel> list = {
#if PC_X86
      &kAvx512Vnni, &kAvx512Vnni256,
#if PC_HAVE_AVX_VNNI
      &kAvxVnni,
#endif
      &kAvx2,
#elif PC_ARM64
#if PC_HAVE_NEON_EXTENSIONS
      &kNeonI8mm,
      &kNeonDotprod,
#endif
      &kNeon,
#endif
      &kScalar,
  };
  return list;
}

size_t packed_bytes(const Kernel& kernel, const Shape& s) {
  if (is_depthwise(s)) return static_cast<size_t>(s.taps() * s.c);
  const Layout layout(gemm_for(kernel, s), s);
  return static_cast<size_t>(round_up(layout.sets * layout.set_bytes + 2 * 4 * s.o, 64));
}

namespace {

// Calls body(out channel, tap, input channel within the group, position in the GEMM matrix of its merged group).
template <class Body>
void for_each_weight(const Shape& s, const Layout& layout, int64_t o, Body&& body) {
  const int64_t group_channels = s.c / s.groups, first = o / (s.o / s.groups) % layout.merged * group_channels;
  for (int64_t t = 0; t < s.taps(); ++t)
    for (int64_t c = 0; c < group_channels; ++c) body(t, c, layout.position(s, t, first + c));
}

}  // namespace

void pack(const Kernel& kernel, const Shape& s, const int8_t* weight, void* packed) {
  if (is_depthwise(s)) {
    for (int64_t t = 0; t < s.taps(); ++t)
      for (int64_t c = 0; c < s.c; ++c) static_cast<int8_t*>(packed)[t * s.c + c] = weight[c * s.taps() + t];
    return;
  }
  const Layout layout(gemm_for(kernel, s), s);
  const int64_t group_channels = s.c / s.groups;
  std::memset(packed, 0, packed_bytes(kernel, s));  // the gaps too: equal weights have equal packs
  int32_t* sums = reinterpret_cast<int32_t*>(static_cast<char*>(packed) + layout.sets * layout.set_bytes);
  std::vector<int8_t> matrix;
  for (int64_t set = 0; set < layout.sets; ++set) {
    matrix.assign(static_cast<size_t>(layout.cols * layout.k()), 0);
    for (int64_t col = 0; col < layout.cols; ++col) {
      const int64_t o = set * layout.cols + col;
      int32_t sum = 0, magnitude = 0;
      for_each_weight(s, layout, o, [&](int64_t t, int64_t c, int64_t k) {
        const int8_t w = weight[(o * group_channels + c) * s.taps() + t];
        matrix[static_cast<size_t>(col * layout.k() + k)] = w;
        sum += w, magnitude += w < 0 ? -w : w;
      });
      sums[o] = sum, sums[s.o + o] = magnitude;
    }
    int8_matmul::pack(gemm_for(kernel, s), matrix.data(), layout.k(), layout.cols, layout.k(),
                      static_cast<char*>(packed) + set * layout.set_bytes);
  }
}

void unpack(const Kernel& kernel, const Shape& s, const void* packed, int8_t* weight) {
  if (is_depthwise(s)) {
    for (int64_t t = 0; t < s.taps(); ++t)
      for (int64_t c = 0; c < s.c; ++c) weight[c * s.taps() + t] = static_cast<const int8_t*>(packed)[t * s.c + c];
    return;
  }
  const Layout layout(gemm_for(kernel, s), s);
  const int64_t group_channels = s.c / s.groups;
  std::vector<int8_t> matrix(static_cast<size_t>(layout.cols * layout.k()));
  for (int64_t set = 0; set < layout.sets; ++set) {
    int8_matmul::unpack(gemm_for(kernel, s), static_cast<const char*>(packed) + set * layout.set_bytes, layout.cols, layout.k(),
                        matrix.data());
    for (int64_t col = 0; col < layout.cols; ++col) {
      const int64_t o = set * layout.cols + col;
      for_each_weight(s, layout, o, [&](int64_t t, int64_t c, int64_t k) {
        weight[(o * group_channels + c) * s.taps() + t] = matrix[static_cast<size_t>(col * layout.k() + k)];
      });
    }
  }
}

namespace {

// 1x1 convolutions in their simplest form: pixels that no window reads are stepped over, and without padding the image is
// as wide as its memory allows, so that rows fill vectors and tiles.
Args simplified(const Args& args) {
  Args a = args;
  Shape& s = a.shape;
  const int64_t oh = s.out_h(), ow = s.out_w();
  if (s.kh == 1 && s.pad_h == 0) {
    a.x_stride[2] *= s.stride_h;
    s.h = oh, s.stride_h = s.dilation_h = 1;
  }
  if (s.kw == 1 && s.pad_w == 0 && a.x_channels_last) {
    a.x_stride[3] *= s.stride_w;
    s.w = ow, s.stride_w = 1;
  }
  if (s.kw == 1) s.dilation_w = 1;
  if (s.taps() == 1 && s.pad_h == 0 && s.pad_w == 0 && s.stride_w == 1 && a.x_stride[2] == s.w * a.x_stride[3]) {
    int64_t join = 1;
    while (join < s.h && (s.h % join || s.w * join < kJoinedPixels)) ++join;
    s.h /= join, s.w *= join, a.x_stride[2] *= join;
  }
  return a;
}

const char* fastest(const Kernel& kernel, const Args& args) {
  if (is_depthwise(args.shape)) return "depthwise";
  if (winograd_applies(kernel, args) && winograd_pays(kernel, args)) return "winograd";
  if (planes_apply(kernel, args) && planes_pay(kernel, args)) return "planes";
  return grouped_applies(kernel, args) && grouped_pays(kernel, args) ? "grouped" : "direct";
}

}  // namespace

const char* chosen(const Kernel& kernel, const Args& args) { return fastest(kernel, args); }

void conv2d(const Kernel& kernel, const Args& args, const char* algorithm) {
  const Shape& s = args.shape;
  if (s.n * s.o * s.out_h() * s.out_w() == 0) return;
  const std::string name = *algorithm ? algorithm : fastest(kernel, args);
  if ((name == "depthwise") != is_depthwise(s) || (name == "winograd" && !winograd_applies(kernel, args)) ||
      (name == "planes" && !planes_apply(kernel, args)) || (name == "grouped" && !grouped_applies(kernel, args)))
    throw std::invalid_argument("int8_conv2d: algorithm '" + name + "' does not apply to this convolution");
  const bool parallel = s.n * s.o * s.out_h() * s.out_w() * (s.c / s.groups) * s.taps() >= kSerialWork && num_threads() > 1;
  std::vector<Image> images(static_cast<size_t>(s.n));
  std::vector<std::atomic<bool>> poisoned(static_cast<size_t>(s.n));
  measure_images(kernel, args, parallel, images.data(), poisoned.data());
  const Args simple = simplified(args);
  if (name == "winograd")
    winograd(kernel, simple, images.data(), parallel, poisoned.data());
  else if (name == "depthwise")
    depthwise(kernel, simple, images.data(), parallel, poisoned.data());
  else if (name == "planes")
    planes(kernel, simple, images.data(), parallel, poisoned.data());
  else if (name == "grouped")
    grouped(kernel, simple, images.data(), parallel, poisoned.data());
  else if (name == "direct")
    direct(kernel, simple, images.data(), parallel, poisoned.data());
  else
    throw std::invalid_argument("int8_conv2d: algorithm must be 'direct', 'planes', 'grouped', 'winograd' or 'depthwise', got '" + name +
                                "'");
  for (int64_t n = 0; n < s.n; ++n)
    if (poisoned[static_cast<size_t>(n)]) Sink(kernel, args).poison(n);
}

}  // namespace pycompress::int8_conv2d
