#include "core/float_rows.h"
#include "parity.h"
#include "sparse24_gemm/sparse24_gemm.h"
#include "sparse24_weight.h"

namespace {

using namespace pycompress;
using namespace pycompress::sparse24_gemm;
using parity::Buffer;
using parity::Random;

std::string name(const Kernel& kernel, int64_t m, int64_t n, int64_t k, int kept, const char* what) {
  return std::string("sparse24_gemm ") + kernel.name + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + " " +
         std::to_string(kept) + ":4 " + what;
}

void compare(const Kernel& kernel, const Kernel& scalar, int64_t m, int64_t n, int64_t k, int kept, DType dtype, Activation activation) {
  Random random(static_cast<uint64_t>(m * 1000003 + n * 1009 + k));
  const parity::SparseWeight<float> weight(n, k, kept, random, [](Random& r) { return r.uniform(-1, 1); });
  const int64_t size = dtype == DType::f32 ? 4 : 2, ldx = k + 3;
  Buffer<float> row(k), bias(n);
  Buffer<char> x(m > 0 ? ((m - 1) * ldx + k) * size : 0), expected(m * n * size), got(m * n * size);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < k; ++i) row[i] = random.uniform(-3, 3);
    if (dtype == DType::f32)
      std::memcpy(x.data() + r * ldx * 4, row.data(), row.bytes());
    else
      narrow_row(row.data(), k, dtype, x.data() + r * ldx * size);
  }
  for (int64_t i = 0; i < n; ++i) bias[i] = random.uniform(-1, 1);
  for (const Kernel* kr : {&scalar, &kernel}) {
    Buffer<uint8_t> packed(static_cast<int64_t>(packed_bytes(*kr, n, k, kept))), indices(weight.indices.size());
    Buffer<float> values(weight.values.size());
    pack(*kr, weight.values.data(), weight.indices.data(), n, k, kept, packed.data());
    unpack(*kr, packed.data(), n, k, kept, values.data(), indices.data());
    parity::expect(std::memcmp(values.data(), weight.values.data(), values.bytes()) == 0 &&
                       std::memcmp(indices.data(), weight.indices.data(), indices.bytes()) == 0,
                   name(*kr, m, n, k, kept, "unpack"));
    linear(*kr,
           {m, n, k, kept, x.data(), ldx, dtype, packed.data(), bias.data(), activation, (kr == &scalar ? expected : got).data(), dtype});
  }
  Buffer<float> wide_expected(m * n), wide_got(m * n);
  if (dtype == DType::f32) {
    std::memcpy(wide_expected.data(), expected.data(), expected.bytes());
    std::memcpy(wide_got.data(), got.data(), got.bytes());
  } else {
    widen_row(expected.data(), dtype, m * n, wide_expected.data());
    widen_row(got.data(), dtype, m * n, wide_got.data());
  }
  // k / 2 fused or unfused roundings of terms up to 3; then a rounding step of the output type.
  const double step = (dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 1.0 / 128 : 1.0 / 1024) + 4e-7 * static_cast<double>(k + 10);
  parity::expect(parity::difference(wide_got.data(), wide_expected.data(), m * n) <= step, name(kernel, m, n, k, kept, "sums"));
}

// An image that is unfolded on the way.
void convolution(const Kernel& kernel, const Kernel& scalar, int64_t n, int kept, const Unfold& shape, int64_t out_h) {
  const int64_t k = shape.depth(), l = out_h * shape.out_w;
  Random random(static_cast<uint64_t>(n * 1009 + k));
  const parity::SparseWeight<float> weight(n, k, kept, random, [](Random& r) { return r.uniform(-1, 1); });
  Buffer<float> image(shape.channels * shape.height * shape.width), bias(n), expected(n * l), got(n * l);
  for (int64_t i = 0; i < image.size(); ++i) image[i] = random.uniform(-3, 3);
  for (int64_t i = 0; i < n; ++i) bias[i] = random.uniform(-1, 1);
  Unfold input = shape;
  input.image = image.data();
  for (const Kernel* kr : {&scalar, &kernel}) {
    Buffer<uint8_t> packed(static_cast<int64_t>(packed_bytes(*kr, n, k, kept)));
    pack(*kr, weight.values.data(), weight.indices.data(), n, k, kept, packed.data());
    convolve(*kr, {n, l, kept, input, packed.data(), bias.data(), Activation::relu, (kr == &scalar ? expected : got).data()});
  }
  parity::expect(parity::difference(got.data(), expected.data(), n * l) <= 4e-7 * static_cast<double>(k + 10),
                 name(kernel, l, n, k, kept, "convolution"));
}

void run() {
  const auto list = parity::usable("sparse24_gemm", kernels());
  const Kernel& scalar = *list.back();
  parity::expect(scalar.isa == Isa::scalar, "the last kernel is not the scalar one");
  // Rows around both ways (few rows; tiles of 16, 32, ..., 128), outputs around panels, depths around groups of 4 and blocks of 32.
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 16, 32},   {2, 7, 5},    {5, 17, 33},    {12, 8, 64},   {16, 9, 31},   {17, 33, 100},
                               {33, 15, 66}, {64, 16, 128}, {65, 40, 37}, {130, 130, 70}, {3, 200, 515}, {0, 3, 4},     {3, 0, 4},
                               {48, 17, 36}, {57, 31, 65},  {80, 33, 96}, {95, 18, 33},   {111, 7, 34},  {127, 34, 129}};
  for (const Kernel* kernel : list) {
    if (kernel == &scalar) continue;
    Kernel without = *kernel;  // 1:4 falls back to 2:4
    without.one = {};
    parity::expect(packed_bytes(without, 9, 70, 1) == packed_bytes(*kernel, 9, 70, 2), "1:4 without a path is not packed as 2:4");
    for (int64_t m : {5, 70}) parity::fresh([&] { compare(without, scalar, m, 33, 66, 1, DType::f32, Activation::none); });
    for (const auto& s : shapes)
      for (int kept : {1, 2})
        for (DType dtype : {DType::f32, DType::bf16, DType::f16})
          parity::fresh([&] { compare(*kernel, scalar, s[0], s[1], s[2], kept, dtype, Activation::none); });
    for (Activation activation : {Activation::relu, Activation::gelu, Activation::silu})
      for (int64_t m : {3, 40}) parity::fresh([&] { compare(*kernel, scalar, m, 21, 50, 2, DType::f32, activation); });
    // channels, height, width, kernel, stride, dilation, positions in a row; the last pixel is read in each.
    const std::pair<Unfold, int64_t> images[] = {{{nullptr, 20, 1, 15, 1, 1, 1, 1, 1, 1, 15}, 1},
                                                 {{nullptr, 66, 8, 8, 1, 1, 1, 1, 1, 1, 8}, 8},
                                                 {{nullptr, 5, 12, 13, 3, 3, 1, 1, 1, 1, 11}, 10},
                                                 {{nullptr, 3, 11, 9, 3, 3, 2, 2, 2, 1, 4}, 4},
                                                 {{nullptr, 7, 9, 20, 2, 5, 1, 1, 1, 2, 12}, 8}};
    for (const auto& [image, out_h] : images)
      for (int64_t n : {7, 150})
        for (int kept : {1, 2}) {
          const Unfold& shape = image;
          const int64_t rows = out_h;
          parity::fresh([&] { convolution(*kernel, scalar, n, kept, shape, rows); });
        }
  }
}

const parity::Suite suite("sparse24_gemm", run);

}  // namespace
