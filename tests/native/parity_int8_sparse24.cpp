#include <cmath>
#include <limits>

#include "core/float_rows.h"
#include "int8_sparse24/int8_sparse24.h"
#include "parity.h"
#include "sparse24_weight.h"

namespace {

using namespace pycompress;
using namespace pycompress::int8_sparse24;
using parity::Buffer;
using parity::Random;

struct Case {
  int64_t m, n, k;
  int kept = 2;
  bool dynamic = true, extreme = false;
  DType dtype = DType::f32;
  Activation activation = Activation::none;
};

std::string name(const Kernel& kernel, const Case& c, const char* what) {
  return std::string("int8_sparse24 ") + kernel.name + " " + std::to_string(c.m) + "x" + std::to_string(c.n) + "x" + std::to_string(c.k) +
         " " + std::to_string(c.kept) + ":4 " + (c.dynamic ? "dynamic" : "static") + (c.extreme ? " extreme" : "") + ", type " +
         std::to_string(static_cast<int>(c.dtype)) + ", activation " + std::to_string(static_cast<int>(c.activation)) + " " + what;
}

void compare(const Kernel& kernel, const Kernel& scalar, const Case& c) {
  Random random(static_cast<uint64_t>(c.m * 1000003 + c.n * 1009 + c.k));
  const parity::SparseWeight<int8_t> weight(c.n, c.k, c.kept, random, [&](Random& r) { return c.extreme ? int8_t{-128} : r.i8(); });
  const int64_t size = c.dtype == DType::f32 ? 4 : 2, ldx = c.k + 3;
  Buffer<float> row(c.k), scale(c.n), bias(c.n);
  Buffer<char> x(c.m > 0 ? ((c.m - 1) * ldx + c.k) * size : 0), expected(c.m * c.n * size), got(c.m * c.n * size);
  for (int64_t r = 0; r < c.m; ++r) {
    for (int64_t i = 0; i < c.k; ++i) row[i] = c.extreme ? 3.0f : random.uniform(-3, 3);
    if (c.k > 0 && r % 7 == 4) row[random.below(c.k)] = std::numeric_limits<float>::quiet_NaN();
    if (c.k > 0 && r % 7 == 5) row[c.k - 1] = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; r % 7 == 6 && i < c.k; ++i) row[i] = 0;
    if (c.dtype == DType::f32)
      std::memcpy(x.data() + r * ldx * 4, row.data(), row.bytes());
    else
      narrow_row(row.data(), c.k, c.dtype, x.data() + r * ldx * size);
  }
  for (int64_t i = 0; i < c.n; ++i) scale[i] = random.uniform(1e-3f, 2e-2f), bias[i] = random.uniform(-1, 1);
  for (const Kernel* kr : {&scalar, &kernel}) {
    Buffer<uint8_t> packed(static_cast<int64_t>(packed_bytes(*kr, c.n, c.k, c.kept))), indices(weight.indices.size());
    Buffer<int8_t> values(weight.values.size());
    pack(*kr, weight.values.data(), weight.indices.data(), c.n, c.k, c.kept, packed.data());
    unpack(*kr, packed.data(), c.n, c.k, c.kept, values.data(), indices.data());
    parity::expect(std::memcmp(values.data(), weight.values.data(), values.bytes()) == 0 &&
                       std::memcmp(indices.data(), weight.indices.data(), indices.bytes()) == 0,
                   name(*kr, c, "unpack"));
    linear(*kr, {c.m, c.n, c.k, c.kept, x.data(), ldx, c.dtype, packed.data(), scale.data(), bias.data(), c.dynamic, 0.02f, c.activation,
                 (kr == &scalar ? expected : got).data(), c.dtype});
  }
  Buffer<float> wide_expected(c.m * c.n), wide_got(c.m * c.n);
  if (c.dtype == DType::f32) {
    std::memcpy(wide_expected.data(), expected.data(), expected.bytes());
    std::memcpy(wide_got.data(), got.data(), got.bytes());
  } else {
    widen_row(expected.data(), c.dtype, c.m * c.n, wide_expected.data());
    widen_row(got.data(), c.dtype, c.m * c.n, wide_got.data());
  }
  if (c.activation == Activation::none || c.activation == Activation::relu) {
    parity::expect(parity::same_bits(wide_got.data(), wide_expected.data(), c.m * c.n), name(kernel, c, "bits"));
  } else {  // polynomials against libm
    parity::expect(parity::difference(wide_got.data(), wide_expected.data(), c.m * c.n) <= 2e-6, name(kernel, c, "activation"));
  }
}

// Rows gathered out of an image against the same rows in a matrix.
void convolution(const Kernel& kernel, int kept) {
  Unfold image{nullptr, 5, 11, 12, 3, 3, 2, 1, 1, 2, 8};
  const int64_t k = image.depth(), n = 21, m = 5 * image.out_w;
  Random random(static_cast<uint64_t>(kept));
  const parity::SparseWeight<int8_t> weight(n, k, kept, random, [](Random& r) { return r.i8(); });
  Buffer<float> pixels(5 * 11 * 12), rows(m * k), scale(n), expected(m * n), got(m * n);
  for (int64_t i = 0; i < pixels.size(); ++i) pixels[i] = random.uniform(-3, 3);
  for (int64_t i = 0; i < n; ++i) scale[i] = random.uniform(1e-3f, 2e-2f);
  image.image = pixels.data();
  for (int64_t p = 0; p < m; ++p) unfold_position(image, p, rows.data() + p * k);
  Buffer<uint8_t> packed(static_cast<int64_t>(packed_bytes(kernel, n, k, kept)));
  pack(kernel, weight.values.data(), weight.indices.data(), n, k, kept, packed.data());
  LinearArgs args{m,
                  n,
                  k,
                  kept,
                  rows.data(),
                  k,
                  DType::f32,
                  packed.data(),
                  scale.data(),
                  nullptr,
                  false,
                  0.02f,
                  Activation::none,
                  expected.data(),
                  DType::f32};
  linear(kernel, args);
  args.x = nullptr, args.out = got.data(), args.image = image;
  linear(kernel, args);
  parity::expect(parity::same_bits(got.data(), expected.data(), m * n), std::string("int8_sparse24 ") + kernel.name + " convolution");
  args.planes = true;
  linear(kernel, args);
  bool same = true;
  for (int64_t p = 0; p < m; ++p)
    for (int64_t c = 0; c < n; ++c) same = same && got[c * m + p] == expected[p * n + c];
  parity::expect(same, std::string("int8_sparse24 ") + kernel.name + " planes");
}

void run() {
  const auto list = parity::usable("int8_sparse24", kernels());
  const Kernel& scalar = *list.back();
  parity::expect(scalar.isa == Isa::scalar, "the last kernel is not the scalar one");
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 16, 32},   {2, 7, 5},     {5, 17, 33},   {6, 8, 64}, {7, 33, 31}, {12, 64, 100},
                               {13, 65, 66}, {3, 130, 260}, {40, 47, 129}, {25, 200, 37}, {0, 3, 4},  {3, 0, 4},   {3, 4, 0}};
  for (const Kernel* kernel : list) {
    for (int kept : {1, 2}) parity::fresh([&] { convolution(*kernel, kept); });
    if (kernel == &scalar) continue;
    const auto check = [&](const Case& c) { parity::fresh([&] { compare(*kernel, scalar, c); }); };
    Kernel without = *kernel;  // 1:4 falls back to 2:4
    without.one = {};
    parity::expect(packed_bytes(without, 9, 70, 1) == packed_bytes(*kernel, 9, 70, 2), "1:4 without a path is not packed as 2:4");
    for (int64_t k : {31, 66}) parity::fresh([&] { compare(without, scalar, {13, 33, k, 1}); });
    for (const auto& s : shapes)
      for (int kept : {1, 2})
        for (bool dynamic : {false, true}) check({s[0], s[1], s[2], kept, dynamic});
    for (int64_t k : {4, 512, 8192})
      for (int kept : {1, 2}) check({17, 17, k, kept, true, true});
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (Activation activation : {Activation::none, Activation::relu})
        for (int kept : {1, 2}) check({13, 65, 39, kept, true, false, dtype, activation});
    for (Activation activation : {Activation::gelu, Activation::silu}) check({13, 65, 39, 2, true, false, DType::f32, activation});
  }
}

const parity::Suite suite("int8_sparse24", run);

}  // namespace
