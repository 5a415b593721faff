// Plain C++: runs everywhere, and is what the vector kernels are read against.
#include <cmath>

#include "core/float_rows.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

constexpr int kMr = 4, kNr = 8, kKr = 2;

// As an integer, |x| orders like |x| and NaN is the largest.
float amax(const float* x, int64_t k) {
  uint32_t best = 0;
  for (int64_t i = 0; i < k; ++i) {
    uint32_t u;
    std::memcpy(&u, x + i, 4);
    u &= 0x7fffffffu;
    best = u > best ? u : best;
  }
  float f;
  std::memcpy(&f, &best, 4);
  return f;
}

void range(const float* x, int64_t k, float* low, float* high) {
  float lo = 0.0f, hi = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    lo = x[i] < lo ? x[i] : lo;
    hi = x[i] > hi ? x[i] : hi;
  }
  *low = lo, *high = hi;
}

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, int zero_point, int quant_min, void* dst) {
  int16_t* d = static_cast<int16_t*>(dst);
  const float lo = static_cast<float>(quant_min - zero_point), hi = static_cast<float>(127 - zero_point);
  for (int64_t i = 0; i < k; ++i) {
    float y = x[i] * inverse;
    y = y > lo ? y : lo;  // NaN becomes lo
    y = y < hi ? y : hi;
    d[i] = static_cast<int16_t>(std::nearbyint(y));  // q - zero_point
  }
  for (int64_t i = k; i < kp; ++i) d[i] = 0;
}

void load_row(const int8_t* a, int64_t k, int64_t kp, int zero_point, void* dst) {
  int16_t* d = static_cast<int16_t*>(dst);
  for (int64_t i = 0; i < k; ++i) d[i] = static_cast<int16_t>(a[i] - zero_point);
  for (int64_t i = k; i < kp; ++i) d[i] = 0;
}

void tile(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, int cols, int32_t* acc) {
  for (int i = 0; i < rows * kNr; ++i) acc[i] = 0;
  for (int s = 0; s < segments; ++s, b += depth * cols) {
    for (int r = 0; r < rows; ++r) {
      const int16_t* x = static_cast<const int16_t*>(a[s * rows + r]);
      for (int64_t i = 0; i < depth; i += kKr)
        for (int c = 0; c < cols; ++c) acc[r * kNr + c] += x[i] * b[i * cols + c * kKr] + x[i + 1] * b[i * cols + c * kKr + 1];
    }
  }
}

void store_f32(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) {
      const float y = std::fma(static_cast<float>(acc[r * kNr + c]), e.row_scale[r] * e.col_scale[c], e.bias ? e.bias[c] : 0.0f);
      out[r * ldo + c] = activate(y, e.activation);
    }
}

}  // namespace

extern const Kernel kScalar;
const Kernel kScalar = {"scalar",     Isa::scalar, kMr,       kNr,  1,         kKr,        2,       amax,   range,
                        quantize_row, load_row,    widen_row, tile, store_f32, narrow_row, nullptr, nullptr};

}  // namespace pycompress::int8_matmul
