#include <cmath>
#include <limits>

#include "core/float_rows.h"
#include "int4_matmul/int4_matmul.h"
#include "parity.h"

namespace {

using namespace pycompress;
using namespace pycompress::int4_matmul;
using parity::Buffer;
using parity::Random;

struct Case {
  int64_t m, n, k, group;
  bool asymmetric, int8_activations;
  DType x_type = DType::f32, out_type = DType::f32;
  Activation activation = Activation::none;
  bool bias = true;
};

std::string name(const Kernel& kernel, const Case& c, const char* what) {
  std::string text = std::string("int4_matmul ") + kernel.name;
  for (int64_t number : {c.m, c.n, c.k, c.group, int64_t{c.asymmetric}, int64_t{c.int8_activations}, static_cast<int64_t>(c.x_type),
                         static_cast<int64_t>(c.out_type), static_cast<int64_t>(c.activation)})
    text += " " + std::to_string(number);
  return text + " " + what;
}

void compare(const Kernel& kernel, const Kernel& scalar, const Case& c) {
  Random random(static_cast<uint64_t>(c.m * 1000003 + c.n * 1009 + c.k));
  const int64_t groups = (c.k + c.group - 1) / c.group, row_bytes = (c.k + 1) / 2, ldx = c.k + 3;
  const int64_t x_size = c.x_type == DType::f32 ? 4 : 2, out_size = c.out_type == DType::f32 ? 4 : 2;
  Buffer<float> x(c.k), scale(c.n * groups), bias(c.n);
  Buffer<char> rows(c.m > 0 ? ((c.m - 1) * ldx + c.k) * x_size : 0);
  for (int64_t r = 0; r < c.m; ++r) {
    // Ordinary rows; rows of zeros, of huge and of tiny values, and (last) one that is not finite.
    const float size = r % 7 == 2 ? 0.0f : r % 7 == 3 ? 1e30f : r % 7 == 4 ? 1e-28f : 3.0f;
    for (int64_t i = 0; i < c.k; ++i) x[i] = random.uniform(-size, size);
    if (c.k > 0 && r % 7 == 5) x[random.below(c.k)] = std::numeric_limits<float>::quiet_NaN();
    if (c.k > 0 && r % 7 == 6) x[c.k - 1] = -std::numeric_limits<float>::infinity();
    if (c.x_type == DType::f32)
      std::memcpy(rows.data() + r * ldx * 4, x.data(), x.bytes());
    else
      narrow_row(x.data(), c.k, c.x_type, rows.data() + r * ldx * x_size);
  }
  Buffer<uint8_t> weight(c.n * row_bytes), zero(c.asymmetric ? c.n * groups : 0);
  for (int64_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<uint8_t>(random.below(256));
  if (c.k % 2)  // the last nibble of an odd row holds nothing
    for (int64_t r = 0; r < c.n; ++r) weight[r * row_bytes + row_bytes - 1] &= 15;
  for (int64_t i = 0; i < scale.size(); ++i) scale[i] = random.uniform(1e-3f, 2e-2f);
  for (int64_t i = 0; i < zero.size(); ++i) zero[i] = static_cast<uint8_t>(random.below(16));
  for (int64_t i = 0; i < c.n; ++i) bias[i] = random.uniform(-1, 1);

  Buffer<char> expected(c.m * c.n * out_size), got(c.m * c.n * out_size);
  for (const Kernel* kr : {&scalar, &kernel}) {
    Buffer<char> packed(static_cast<int64_t>(packed_bytes(*kr, c.n, c.k, c.group, c.asymmetric)));
    pack(*kr, weight.data(), scale.data(), c.asymmetric ? zero.data() : nullptr, c.n, c.k, c.group, packed.data());
    Buffer<uint8_t> weight_back(weight.size()), zero_back(zero.size());
    Buffer<float> scale_back(scale.size());
    unpack(*kr, packed.data(), c.n, c.k, c.group, weight_back.data(), scale_back.data(), c.asymmetric ? zero_back.data() : nullptr);
    parity::expect(std::memcmp(weight_back.data(), weight.data(), weight.bytes()) == 0 &&
                       std::memcmp(scale_back.data(), scale.data(), scale.bytes()) == 0 &&
                       std::memcmp(zero_back.data(), zero.data(), zero.bytes()) == 0,
                   name(*kr, c, "unpack"));
    linear(*kr, {c.m, c.n, c.k, c.group, rows.data(), ldx, c.x_type, packed.data(), c.asymmetric, c.bias ? bias.data() : nullptr,
                 c.int8_activations, c.activation, (kr == &scalar ? expected : got).data(), c.out_type});
  }
  Buffer<float> wide_expected(c.m * c.n), wide_got(c.m * c.n);
  if (c.out_type == DType::f32) {
    std::memcpy(wide_expected.data(), expected.data(), expected.bytes());
    std::memcpy(wide_got.data(), got.data(), got.bytes());
  } else {
    widen_row(expected.data(), c.out_type, c.m * c.n, wide_expected.data());
    widen_row(got.data(), c.out_type, c.m * c.n, wide_got.data());
  }
  if (c.activation == Activation::none || c.activation == Activation::relu) {
    parity::expect(parity::same_bits(wide_got.data(), wide_expected.data(), c.m * c.n), name(kernel, c, "bits"));
  } else {  // polynomials against libm; a rounding step of the output type on top
    const double step = c.out_type == DType::f32 ? 2e-6 : c.out_type == DType::bf16 ? 1.0 / 128 : 1.0 / 1024;
    parity::expect(parity::difference(wide_got.data(), wide_expected.data(), c.m * c.n) <= step, name(kernel, c, "activation"));
  }
}

void run() {
  const auto list = parity::usable("int4_matmul", kernels());
  const Kernel& scalar = *list.back();
  parity::expect(scalar.isa == Isa::scalar, "the last kernel is not the scalar one");
  // Rows around the tile of 6, columns around vectors (8, 16) and panels (64), depths around groups and odd.
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 64, 32},   {2, 3, 33},     {5, 16, 64},   {6, 17, 65}, {7, 63, 127}, {12, 65, 128},
                               {13, 8, 129}, {1, 200, 513}, {31, 130, 300}, {3, 64, 1027}, {0, 5, 64},  {4, 0, 64}};
  for (const Kernel* kernel : list) {
    if (kernel == &scalar) continue;
    for (const auto& s : shapes)
      for (int64_t group : {32, 64, 128})
        for (bool asymmetric : {false, true})
          for (bool int8_activations : {false, true}) {
            const Case c{s[0], s[1], s[2], group, asymmetric, int8_activations};
            parity::fresh([&] { compare(*kernel, scalar, c); });
          }
    for (DType type : {DType::f32, DType::bf16, DType::f16})
      for (Activation activation : parity::kActivations)
        for (bool int8_activations : {false, true})
          for (bool bias : {false, true}) {
            const Case c{9, 70, 95, 32, true, int8_activations, type, type, activation, bias};
            parity::fresh([&] { compare(*kernel, scalar, c); });
          }
  }
}

const parity::Suite suite("int4_matmul", run);

}  // namespace
