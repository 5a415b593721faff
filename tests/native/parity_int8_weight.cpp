#include "core/float_rows.h"
#include "int8_weight/int8_weight.h"
#include "parity.h"

namespace {

using namespace pycompress;
using namespace pycompress::int8_weight;
using parity::Buffer;
using parity::Random;

void compare(const Kernel& kernel, const Kernel& scalar, int64_t m, int64_t n, int64_t k, DType dtype, bool with_bias) {
  Random random(static_cast<uint64_t>(m * 1000003 + n * 1009 + k));
  const int64_t size = dtype == DType::f32 ? 4 : 2, ldx = k + 3;
  Buffer<float> row(k), scale(n), bias(n);
  Buffer<char> x(m > 0 ? ((m - 1) * ldx + k) * size : 0), expected(m * n * size), got(m * n * size);
  Buffer<int8_t> weight(n * k);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < k; ++i) row[i] = random.uniform(-3, 3);
    if (dtype == DType::f32)
      std::memcpy(x.data() + r * ldx * 4, row.data(), row.bytes());
    else
      narrow_row(row.data(), k, dtype, x.data() + r * ldx * size);
  }
  for (int64_t i = 0; i < n * k; ++i) weight[i] = random.i8();
  for (int64_t i = 0; i < n; ++i) scale[i] = random.uniform(1e-3f, 2e-2f), bias[i] = random.uniform(-1, 1);
  for (const Kernel* kr : {&scalar, &kernel})
    linear(*kr, {m, n, k, x.data(), ldx, dtype, weight.data(), scale.data(), with_bias ? bias.data() : nullptr,
                 (kr == &scalar ? expected : got).data()});
  Buffer<float> wide_expected(m * n), wide_got(m * n);
  if (dtype == DType::f32) {
    std::memcpy(wide_expected.data(), expected.data(), expected.bytes());
    std::memcpy(wide_got.data(), got.data(), got.bytes());
  } else {
    widen_row(expected.data(), dtype, m * n, wide_expected.data());
    widen_row(got.data(), dtype, m * n, wide_got.data());
  }
  // Sums in another order: k roundings of terms up to 3 * 127 * 0.02; then a rounding step of the output type.
  const double step = (dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 1.0 / 128 : 1.0 / 1024) + 1e-6 * static_cast<double>(k + 10);
  parity::expect(parity::difference(wide_got.data(), wide_expected.data(), m * n) <= step,
                 std::string("int8_weight ") + kernel.name + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k));
}

void run() {
  const auto list = parity::usable("int8_weight", kernels());
  const Kernel& scalar = *list.back();
  parity::expect(scalar.isa == Isa::scalar, "the last kernel is not the scalar one");
  const int64_t shapes[][3] = {{1, 1, 1},   {1, 4, 16},   {2, 3, 5},     {3, 5, 7},     {4, 4, 8}, {5, 9, 15}, {7, 6, 17},
                               {8, 13, 31}, {1, 70, 129}, {17, 33, 257}, {3, 520, 300}, {0, 3, 4}, {3, 0, 4},  {3, 4, 0}};
  for (const Kernel* kernel : list) {
    if (kernel == &scalar) continue;
    for (const auto& s : shapes)
      for (DType dtype : {DType::f32, DType::bf16, DType::f16})
        for (bool with_bias : {false, true}) parity::fresh([&] { compare(*kernel, scalar, s[0], s[1], s[2], dtype, with_bias); });
  }
}

const parity::Suite suite("int8_weight", run);

}  // namespace
