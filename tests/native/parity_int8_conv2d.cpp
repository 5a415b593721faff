#include <algorithm>
#include <cmath>
#include <limits>

#include "core/float_rows.h"
#include "int8_conv2d/int8_conv2d.h"
#include "int8_conv2d/layout.h"
#include "parity.h"

namespace {

using namespace pycompress;
using namespace pycompress::int8_conv2d;
using parity::Buffer;
using parity::Random;

struct Case {
  Shape shape;
  Element x_type = Element::f32, out_type = Element::f32;
  bool x_last = false, out_last = false, dynamic = true;
  int zero_point = 0;
  Activation activation = Activation::none;
  int residual = 0;  // 0 none, 1 float32, 2 int8
};

std::string name(const Kernel& kernel, const Case& c, const char* what) {
  const Shape& s = c.shape;
  std::string text = std::string("int8_conv2d ") + kernel.name;
  for (int64_t number :
       {s.n, s.c, s.h, s.w, s.o, s.kh, s.kw, s.stride_h, s.stride_w, s.pad_h, s.pad_w, s.dilation_h, s.dilation_w, s.groups})
    text += " " + std::to_string(number);
  text += ", types " + std::to_string(static_cast<int>(c.x_type)) + " " + std::to_string(static_cast<int>(c.out_type));
  text += std::string(c.x_last ? " last" : " planes") + (c.out_last ? " last" : " planes") + (c.dynamic ? " dynamic" : " static ");
  if (!c.dynamic) text += std::to_string(c.zero_point);
  return text + ", activation " + std::to_string(static_cast<int>(c.activation)) + ", residual " + std::to_string(c.residual) + " " + what;
}

int64_t size_of(Element type) { return type == Element::f32 ? 4 : type == Element::i8 ? 1 : 2; }

void fill(Buffer<char>& out, int64_t count, Element type, Random& random) {
  if (type == Element::i8) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<char>(random.i8());
    return;
  }
  Buffer<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = random.uniform(-3, 3);
  if (type == Element::f32)
    std::memcpy(out.data(), values.data(), out.bytes());
  else
    narrow_row(values.data(), count, static_cast<DType>(type), out.data());
}

// Sums from the definition, for int8 inputs with scale 1, where float32 shows them whole.
void sums(const Kernel& kernel, const Shape& s, const char* algorithm) {
  Random random(static_cast<uint64_t>(s.c * 1009 + s.o * 31 + s.h));
  const int64_t cg = s.c / s.groups, og = s.o / s.groups, oh = s.out_h(), ow = s.out_w();
  const int zero_point = -7;
  Buffer<int8_t> x(s.n * s.c * s.h * s.w), weight(s.o * cg * s.taps()), back(weight.size());
  for (int64_t i = 0; i < x.size(); ++i) x[i] = random.i8();
  for (int64_t i = 0; i < weight.size(); ++i) weight[i] = random.i8();
  Buffer<float> scale(s.o), out(s.n * s.o * oh * ow);
  for (int64_t i = 0; i < s.o; ++i) scale[i] = 1;
  Buffer<char> packed(static_cast<int64_t>(packed_bytes(kernel, s)));
  pack(kernel, s, weight.data(), packed.data());
  unpack(kernel, s, packed.data(), back.data());
  parity::expect(std::memcmp(back.data(), weight.data(), weight.bytes()) == 0, name(kernel, {s}, "unpack"));
  Args a{};
  a.shape = s, a.x = x.data(), a.x_type = Element::i8, a.x_channels_last = true, a.packed = packed.data(), a.scale = scale.data();
  a.x_stride[0] = s.c * s.h * s.w, a.x_stride[1] = 1, a.x_stride[2] = s.w * s.c, a.x_stride[3] = s.c;
  a.out_channels_last = true, a.x_scale = 1, a.x_zero_point = zero_point, a.quant_min = -128, a.out = out.data(), a.out_type = Element::f32;
  conv2d(kernel, a, algorithm);
  bool right = true;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t o = 0; o < s.o; ++o)
      for (int64_t y = 0; y < oh; ++y)
        for (int64_t px = 0; px < ow; ++px) {
          int64_t sum = 0;
          for (int64_t c = 0; c < cg; ++c)
            for (int64_t ky = 0; ky < s.kh; ++ky)
              for (int64_t kx = 0; kx < s.kw; ++kx) {
                const int64_t iy = y * s.stride_h - s.pad_h + ky * s.dilation_h, ix = px * s.stride_w - s.pad_w + kx * s.dilation_w;
                if (iy < 0 || iy >= s.h || ix < 0 || ix >= s.w) continue;
                const int64_t channel = o / og * cg + c;
                sum += (x[((n * s.h + iy) * s.w + ix) * s.c + channel] - zero_point) * weight[((o * cg + c) * s.kh + ky) * s.kw + kx];
              }
          right &= out[((n * oh + y) * ow + px) * s.o + o] == static_cast<float>(sum);
        }
  parity::expect(right, name(kernel, {s}, "sums ") + algorithm);
}

// What the kernel picks by itself, and pixels in the lanes and small groups wherever they apply.
void compare(const Kernel& kernel, const Kernel& scalar, const Case& c, const char* algorithm) {
  const Shape& s = c.shape;
  Random random(static_cast<uint64_t>(s.c * 1009 + s.o * 31 + s.h));
  const int64_t cg = s.c / s.groups, out_count = s.n * s.o * s.out_h() * s.out_w(), x_count = s.n * s.c * s.h * s.w;
  Buffer<char> x(x_count * size_of(c.x_type));
  fill(x, x_count, c.x_type, random);
  Buffer<int8_t> weight(s.o * cg * s.taps());
  for (int64_t i = 0; i < weight.size(); ++i) weight[i] = random.i8();
  Buffer<float> scale(s.o), bias(s.o);
  for (int64_t i = 0; i < s.o; ++i) scale[i] = random.uniform(1e-3f, 2e-2f), bias[i] = random.uniform(-1, 1);
  const Element residual_type = c.residual == 2 ? Element::i8 : Element::f32;
  Buffer<char> residual(c.residual ? out_count * size_of(residual_type) : 0);
  fill(residual, c.residual ? out_count : 0, residual_type, random);
  Buffer<char> expected(out_count * size_of(c.out_type)), got(out_count * size_of(c.out_type));
  for (const Kernel* kr : {&scalar, &kernel}) {
    Buffer<char> packed(static_cast<int64_t>(packed_bytes(*kr, s)));
    pack(*kr, s, weight.data(), packed.data());
    Args a{};
    a.shape = s, a.x = x.data(), a.x_type = c.x_type, a.x_channels_last = c.x_last;
    a.x_stride[0] = s.c * s.h * s.w, a.x_stride[1] = c.x_last ? 1 : s.h * s.w, a.x_stride[2] = c.x_last ? s.w * s.c : s.w;
    a.x_stride[3] = c.x_last ? s.c : 1;
    a.packed = packed.data(), a.scale = scale.data(), a.bias = bias.data();
    a.dynamic = c.dynamic, a.x_scale = 0.03f, a.x_zero_point = c.zero_point, a.quant_min = c.dynamic ? -127 : -128;
    a.activation = c.activation, a.out = (kr == &scalar ? expected : got).data(), a.out_type = c.out_type, a.out_channels_last = c.out_last;
    a.out_scale = 0.05f, a.out_zero_point = 3, a.out_min = -128;
    a.residual = c.residual ? residual.data() : nullptr, a.residual_type = residual_type, a.residual_scale = 0.02f;
    a.residual_zero_point = -5;
    const std::string forced = kr == &scalar ? "" : algorithm;
    if ((forced == "planes" && !planes_apply(*kr, a)) || (forced == "grouped" && !grouped_applies(*kr, a))) return;
    conv2d(*kr, a, forced.c_str());
  }
  if (c.out_type == Element::i8) {
    parity::expect(std::memcmp(got.data(), expected.data(), got.bytes()) == 0, name(kernel, c, "bytes"));
    return;
  }
  Buffer<float> wide_expected(out_count), wide_got(out_count);
  for (auto [from, to] : {std::pair{&expected, &wide_expected}, std::pair{&got, &wide_got}}) {
    if (c.out_type == Element::f32)
      std::memcpy(to->data(), from->data(), from->bytes());
    else
      widen_row(from->data(), static_cast<DType>(c.out_type), out_count, to->data());
  }
  parity::expect(parity::same_bits(wide_got.data(), wide_expected.data(), out_count), name(kernel, c, "bits"));
}

void run() {
  const auto list = parity::usable("int8_conv2d", kernels());
  const Kernel& scalar = *list.back();
  parity::expect(scalar.isa == Isa::scalar, "the last kernel is not the scalar one");
  // n c h w, o kh kw, stride, padding, dilation, groups: 1x1, 3x3 (direct and Winograd), strides, dilation, groups, depthwise with and
  // without a multiplier, odd everything, an output of one pixel, padding wider than the image; small groups with strides and dilation,
  // depthwise over several vectors of pixels and blocks of channels; pixels that AVX2 encodes.
  const Shape shapes[] = {
      {1, 3, 7, 9, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1},      {2, 16, 9, 9, 17, 3, 3, 1, 1, 1, 1, 1, 1, 1},
      {1, 32, 14, 14, 64, 3, 3, 1, 1, 1, 1, 1, 1, 1},  {1, 64, 6, 17, 33, 1, 1, 1, 1, 0, 0, 1, 1, 1},
      {1, 20, 11, 8, 16, 1, 1, 2, 2, 0, 0, 1, 1, 1},   {1, 7, 12, 10, 9, 3, 3, 2, 2, 1, 1, 1, 1, 1},
      {1, 3, 17, 19, 8, 7, 7, 2, 2, 3, 3, 1, 1, 1},    {1, 8, 13, 11, 8, 3, 3, 1, 1, 2, 2, 2, 2, 1},
      {2, 8, 9, 9, 12, 3, 3, 1, 1, 1, 1, 1, 1, 4},     {1, 6, 8, 8, 6, 3, 3, 1, 1, 1, 1, 1, 1, 6},
      {1, 35, 15, 13, 35, 3, 3, 2, 2, 1, 1, 1, 1, 35}, {1, 5, 9, 9, 10, 5, 5, 1, 1, 2, 2, 1, 1, 5},
      {1, 9, 1, 33, 11, 1, 5, 1, 1, 0, 2, 1, 1, 1},    {1, 4, 3, 3, 3, 3, 3, 1, 1, 0, 0, 1, 1, 1},
      {1, 2, 2, 2, 2, 3, 3, 1, 1, 4, 4, 1, 1, 1},      {1, 32, 9, 20, 24, 3, 3, 2, 2, 1, 1, 1, 1, 4},
      {1, 64, 7, 10, 13, 1, 1, 1, 1, 0, 0, 1, 1, 1},   {1, 3, 17, 40, 9, 3, 5, 2, 4, 1, 2, 2, 1, 1},
      {2, 32, 5, 9, 16, 3, 3, 1, 1, 1, 1, 1, 1, 8},    {1, 16, 5, 19, 8, 1, 3, 1, 1, 0, 3, 1, 2, 2},
      {1, 70, 5, 20, 70, 3, 3, 1, 1, 4, 5, 1, 1, 70},  {1, 3, 20, 45, 3, 5, 5, 2, 2, 2, 2, 1, 1, 3},
      {1, 3, 9, 90, 3, 4, 6, 1, 4, 4, 3, 1, 1, 3},     {1, 132, 6, 13, 130, 1, 1, 1, 1, 0, 0, 1, 1, 1},
      {1, 128, 5, 16, 129, 1, 1, 2, 3, 0, 0, 1, 1, 1}, {1, 128, 4, 5, 128, 1, 1, 1, 1, 1, 2, 1, 1, 1},
  };
  for (const Kernel* kernel : list) {
    for (const Shape& s : shapes) {
      parity::fresh([&] { sums(*kernel, s, ""); });
      if (kernel->winograd_rows && s.kh * s.kw == 9 && s.stride_h == 1 && s.dilation_h == 1 && s.groups == 1 && s.c % kernel->gemm->kr == 0)
        parity::fresh([&] { sums(*kernel, s, "winograd"); });
    }
    if (kernel == &scalar) continue;
    const auto check = [&](const Case& c) {
      for (const char* algorithm : {"", "planes", "grouped"}) parity::fresh([&] { compare(*kernel, scalar, c, algorithm); });
    };
    for (const Shape& s : shapes) {
      for (bool last : {false, true}) {
        check({s, Element::f32, Element::f32, last, last});
        check({s, Element::f32, Element::f32, last, last, false, 17, Activation::relu});
        check({s, Element::f32, Element::f32, last, last, false, 127, Activation::none, 1});
        for (Element type : {Element::bf16, Element::f16}) check({s, type, type, last, last, true, 0, Activation::relu, 1});
      }
      if (s.groups == 1 || s.groups != s.c) check({s, Element::f32, Element::i8, false, true, false, -128});
      check({s, Element::i8, Element::i8, true, true, false, -9, Activation::relu, 2});
      check({s, Element::i8, Element::f32, true, true, false, 127, Activation::none, 1});
    }
  }
}

const parity::Suite suite("int8_conv2d", run);

}  // namespace
