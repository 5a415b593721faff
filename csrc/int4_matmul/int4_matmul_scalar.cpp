// Plain C++: runs everywhere, and is what the vector kernels are read against.
#include <cmath>

#include "core/float_rows.h"
#include "int4_matmul/int4_matmul.h"

namespace pycompress::int8_matmul {
extern const Kernel kScalar;
}

namespace pycompress::int4_matmul {
namespace {

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, int8_t* q) {
  for (int64_t i = 0; i < k; ++i) {
    float y = x[i] * inverse;
    y = y > -127.0f ? y : -127.0f;  // NaN becomes -127
    y = y < 127.0f ? y : 127.0f;
    q[i] = static_cast<int8_t>(std::nearbyint(y));
  }
  for (int64_t i = k; i < kp; ++i) q[i] = 0;
}

void group_int8(const Group& g) {
  for (int64_t r = 0; r < g.count; ++r) {
    const int8_t* q = static_cast<const int8_t*>(g.rows) + r * g.row_stride;
    const int32_t sum = *reinterpret_cast<const int32_t*>(static_cast<const char*>(g.sums) + r * g.sum_stride);
    int32_t total[kNr] = {};
    for (int64_t i = 0; i < g.depth; ++i)
      for (int c = 0; c < g.cols; ++c) total[c] += q[i] * static_cast<int32_t>(g.weight[i / 8 * g.cols + c] >> kPosition[i % 8] & 15);
    for (int c = 0; c < g.cols; ++c) {
      float& a = g.acc[r * kNr + c];
      a = std::fma(static_cast<float>(total[c] - sum * (g.zero ? g.zero[c] : 8)), g.scale[c], a);
    }
  }
}

void group_float(const Group& g) {
  for (int64_t r = 0; r < g.count; ++r) {
    const float* x = reinterpret_cast<const float*>(static_cast<const char*>(g.rows) + r * g.row_stride);
    const float sum = *reinterpret_cast<const float*>(static_cast<const char*>(g.sums) + r * g.sum_stride);
    float total[kNr] = {};
    for (int64_t i = 0; i < g.depth; ++i) {
      const int down = kPosition[i % 8] - kShift[i % 8];
      const uint32_t mask = 15u << kShift[i % 8];
      for (int c = 0; c < g.cols; ++c)
        total[c] = std::fma(static_cast<float>(static_cast<int32_t>(g.weight[i / 8 * g.cols + c] >> down & mask)), x[i], total[c]);
    }
    for (int c = 0; c < g.cols; ++c) {
      float& a = g.acc[r * kNr + c];
      a = std::fma(std::fma(-(g.zero ? static_cast<float>(g.zero[c]) : 8.0f), sum, total[c]), g.scale[c], a);
    }
  }
}

void store(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c)
      out[r * ldo + c] = activate(std::fma(acc[r * kNr + c], e.row_scale[r], e.bias ? e.bias[c] : 0.0f), e.activation);
}

}  // namespace

extern const Kernel kScalar;
const Kernel kScalar = {"scalar", Isa::scalar, 1, &int8_matmul::kScalar, quantize_row, group_int8, group_float, store};

}  // namespace pycompress::int4_matmul
