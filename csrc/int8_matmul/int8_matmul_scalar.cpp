// Plain C++: runs everywhere, and is what the vector kernels are read against.
#include <cmath>

#include "core/float_rows.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

// One column at a time: its weights lie in a row, so a tile is a few dot products of int16, which GCC, Clang and MSVC turn into the
// baseline's multiply-add of pairs (pmaddwd, smlal). Loops over columns they do not vectorise: 0.5 instead of 5 MAC per cycle.
constexpr int kMr = 4, kNr = 1, kKr = 1;
constexpr int64_t kChunk = 512;  // weights widened at a time: 1 KB, stays in L1

// As an integer, |x| orders like |x| and NaN is the largest.
float amax(const float* x, int64_t k) {
  int32_t best = 0;
  for (int64_t i = 0; i < k; ++i) {
    int32_t u;
    std::memcpy(&u, x + i, 4);
    u &= 0x7fffffff;
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

void dot1(const int16_t* x, const int16_t* w, int64_t count, int32_t* sum) {
  int32_t s = 0;
  for (int64_t i = 0; i < count; ++i) s += x[i] * w[i];
  sum[0] += s;
}

// Four at once load each weight once.
void dot4(const int16_t* x0, const int16_t* x1, const int16_t* x2, const int16_t* x3, const int16_t* w, int64_t count, int32_t* sum) {
  int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t i = 0; i < count; ++i) {
    s0 += x0[i] * w[i];
    s1 += x1[i] * w[i];
    s2 += x2[i] * w[i];
    s3 += x3[i] * w[i];
  }
  sum[0] += s0, sum[1] += s1, sum[2] += s2, sum[3] += s3;
}

void tile(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, int, int32_t* acc) {
  int16_t w[kChunk];
  for (int r = 0; r < rows; ++r) acc[r] = 0;
  for (int s = 0; s < segments; ++s, a += rows, b += depth)
    for (int64_t i = 0; i < depth; i += kChunk) {
      const int64_t count = depth - i < kChunk ? depth - i : kChunk;
      for (int64_t j = 0; j < count; ++j) w[j] = b[i + j];
      const auto x = [&](int r) { return static_cast<const int16_t*>(a[r]) + i; };
      if (rows == kMr)
        dot4(x(0), x(1), x(2), x(3), w, count, acc);
      else
        for (int r = 0; r < rows; ++r) dot1(x(r), w, count, acc + r);
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
