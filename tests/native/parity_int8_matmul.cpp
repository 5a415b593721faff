#include <cmath>
#include <limits>

#include "core/float_rows.h"
#include "int8_matmul/int8_matmul.h"
#include "parity.h"

namespace {

using namespace pycompress;
using namespace pycompress::int8_matmul;
using parity::Buffer;
using parity::Random;

std::string name(const Kernel& kernel, int64_t m, int64_t n, int64_t k, const std::string& what) {
  return std::string("int8_matmul ") + kernel.name + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + " " +
         what;
}

// A product with padded rows of a and of the output; fixed values where `left` is not 1000.
void product(const Kernel& kernel, int64_t m, int64_t n, int64_t k, int left = 1000, int right = 0) {
  Random random(static_cast<uint64_t>(m * 1000003 + n * 1009 + k));
  const int64_t lda = k + 3, ldo = n + 2;
  Buffer<int8_t> a(m > 0 ? (m - 1) * lda + k : 0), b(n * k), packed(static_cast<int64_t>(packed_bytes(kernel, n, k))), back(n * k);
  Buffer<int32_t> out(m > 0 ? (m - 1) * ldo + n : 0);
  for (int64_t i = 0; i < a.size(); ++i) a[i] = left == 1000 ? random.i8() : static_cast<int8_t>(left);
  for (int64_t i = 0; i < b.size(); ++i) b[i] = left == 1000 ? random.i8() : static_cast<int8_t>(right);
  pack(kernel, b.data(), k, n, k, packed.data());
  unpack(kernel, packed.data(), n, k, back.data());
  parity::expect(std::memcmp(back.data(), b.data(), b.bytes()) == 0, name(kernel, m, n, k, "unpack"));
  matmul(kernel, m, n, k, a.data(), lda, packed.data(), out.data(), ldo);
  bool right_sums = true;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = left == 1000 ? 0 : k * left * right;
      for (int64_t x = 0; left == 1000 && x < k; ++x) sum += a[i * lda + x] * b[j * k + x];
      right_sums &= out[i * ldo + j] == sum;
    }
  parity::expect(right_sums, name(kernel, m, n, k, "sums"));
  for (int64_t i = 0; i + 1 < m; ++i)
    for (int64_t j = n; j < ldo; ++j) parity::expect(out[i * ldo + j] == 0x5a5a5a5a, name(kernel, m, n, k, "writes between rows"));
}

struct Mode {
  const char* name;
  bool dynamic, asymmetric;
  float x_scale;
  int x_zero_point, quant_min;
};

const Mode kModes[] = {
    {"dynamic", true, false, 0, 0, -127},
    {"dynamic with zero points", true, true, 0, 0, -128},
    {"static", false, false, 0.02f, 0, -127},
    {"static with zero point 17", false, false, 0.03f, 17, -128},
    {"static with zero point -128", false, false, 0.01f, -128, -128},
    {"static with zero point 127", false, false, 0.01f, 127, -128},
};

// Rows of ordinary values, by m evenly spread, around zero, or close to it but for a few, where k is odd with one sign; and rows that are
// zero, tiny, huge, far from zero or not finite. The AVX2 kernel stores rows in three forms, which it chooses by their values.
void fill(Buffer<float>& x, int64_t m, int64_t k, Random& random) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t r = 0; r < m; ++r) {
    float low = -3, high = 3;
    if (r % 11 == 2) low = high = 0;
    if (r % 11 == 3) low = -1e-38f, high = 1e-38f;
    if (r % 11 == 4) low = -1e38f, high = 3e38f;
    if (r % 11 == 5) low = 1, high = 2;
    if (r % 11 == 6) low = -2, high = -1;
    for (int64_t i = 0; i < k; ++i) x[r * k + i] = random.uniform(low, high);
    for (int64_t i = 0; low == -3 && i < k; ++i)
      x[r * k + i] = 3 * std::pow(x[r * k + i] / 3, m % 3 == 0 ? 1.0f : m % 3 == 1 ? 3.0f : 7.0f);
    for (int64_t i = 0; low == -3 && (r % 11 == 10 || k % 2 == 1) && i < k; ++i) x[r * k + i] = std::fabs(x[r * k + i]);
    if (k > 0 && r % 11 == 7) x[r * k + random.below(k)] = nan;
    if (k > 0 && r % 11 == 8) x[r * k + k - 1] = -inf;
    for (int64_t i = 0; r % 11 == 9 && i < k; ++i) x[r * k + i] = static_cast<float>(random.below(255) - 127) / 2;  // halves: ties
  }
}

void layer(const Kernel& kernel, const Kernel& scalar, int64_t m, int64_t n, int64_t k, const Mode& mode, DType x_type, DType out_type,
           Activation activation, bool with_bias) {
  Random random(static_cast<uint64_t>(m * 1000003 + n * 1009 + k));
  const int64_t x_size = x_type == DType::f32 ? 4 : 2, out_size = out_type == DType::f32 ? 4 : 2;
  Buffer<float> x(m * k), scale(n), bias(n);
  fill(x, m, k, random);
  Buffer<char> narrow(m * k * x_size), weight(n * k);
  if (x_type == DType::f32)
    std::memcpy(narrow.data(), x.data(), narrow.bytes());
  else
    narrow_row(x.data(), m * k, x_type, narrow.data());
  for (int64_t i = 0; i < n; ++i) scale[i] = random.uniform(1e-3f, 2e-2f), bias[i] = random.uniform(-1, 1);
  for (int64_t i = 0; i < n * k; ++i) weight[i] = static_cast<char>(random.i8());
  Buffer<char> expected(m * n * out_size), got(m * n * out_size);
  for (const Kernel* kr : {&scalar, &kernel}) {
    Buffer<char> packed(static_cast<int64_t>(packed_bytes(*kr, n, k)));
    pack(*kr, reinterpret_cast<const int8_t*>(weight.data()), k, n, k, packed.data());
    linear(*kr, {m, n, k, narrow.data(), k, x_type, packed.data(), scale.data(), with_bias ? bias.data() : nullptr, mode.dynamic,
                 mode.asymmetric, mode.x_scale, mode.x_zero_point, mode.quant_min, activation, (kr == &scalar ? expected : got).data(),
                 out_type});
  }
  const std::string what = name(kernel, m, n, k, mode.name) + ", types " + std::to_string(static_cast<int>(x_type)) + " " +
                           std::to_string(static_cast<int>(out_type)) + ", activation " + std::to_string(static_cast<int>(activation));
  Buffer<float> wide_expected(m * n), wide_got(m * n);
  if (out_type == DType::f32) {
    std::memcpy(wide_expected.data(), expected.data(), expected.bytes());
    std::memcpy(wide_got.data(), got.data(), got.bytes());
  } else {
    widen_row(expected.data(), out_type, m * n, wide_expected.data());
    widen_row(got.data(), out_type, m * n, wide_got.data());
  }
  if (activation == Activation::none || activation == Activation::relu) {
    parity::expect(parity::same_bits(wide_got.data(), wide_expected.data(), m * n), what);
  } else {  // polynomials against libm; a rounding step of the output type on top
    const double step = out_type == DType::f32 ? 2e-6 : out_type == DType::bf16 ? 1.0 / 128 : 1.0 / 1024;
    const double d = parity::difference(wide_got.data(), wide_expected.data(), m * n);
    parity::expect(d <= step, what + ", off by " + std::to_string(d));
  }
}

void run() {
  // Around every tile border (rows 1 to 8, columns 8, 16, 64) and depth group (2, 4, 8, 16), primes, empty, several row blocks.
  const int64_t shapes[][3] = {{1, 1, 1},      {1, 64, 4},    {2, 3, 5},       {3, 8, 8},     {5, 15, 3},     {6, 16, 2},     {7, 17, 63},
                               {8, 33, 16},    {12, 64, 64},  {13, 65, 31},    {9, 31, 15},   {11, 16, 7},    {4, 130, 257},  {61, 47, 129},
                               {25, 48, 40},   {100, 200, 7}, {150, 20, 2050}, {23, 20, 515}, {130, 17, 300}, {101, 33, 640}, {90, 18, 387},
                               {85, 20, 1031}, {86, 24, 143}, {0, 3, 4},       {3, 0, 4},     {3, 4, 0}};
  const auto list = parity::usable("int8_matmul", kernels());
  const Kernel& scalar = *list.back();
  parity::expect(scalar.isa == Isa::scalar, "the last kernel is not the scalar one");
  for (const Kernel* kernel : list) {
    for (const auto& s : shapes) parity::fresh([&] { product(*kernel, s[0], s[1], s[2]); });
    for (int left : {-128, 127})
      for (int right : {-128, 127})
        for (int64_t k : {int64_t{2}, int64_t{512}, kMaxK}) parity::fresh([&] { product(*kernel, 7, 17, k, left, right); });
    if (kernel == &scalar) continue;
    for (const auto& s : shapes)
      for (const Mode& mode : kModes) {
        parity::fresh([&] { layer(*kernel, scalar, s[0], s[1], s[2], mode, DType::f32, DType::f32, Activation::none, true); });
        parity::fresh([&] { layer(*kernel, scalar, s[0], s[1], s[2], mode, DType::f32, DType::f32, Activation::relu, false); });
      }
    for (const Mode& mode : kModes)
      for (DType type : {DType::f32, DType::bf16, DType::f16})
        for (Activation activation : parity::kActivations)
          parity::fresh([&] {
            layer(*kernel, scalar, 13, 65, 31, mode, type, type, activation, true);
            layer(*kernel, scalar, 29, 23, 130, mode, type, DType::f32, activation, true);
          });
  }
}

const parity::Suite suite("int8_matmul", run);

}  // namespace
