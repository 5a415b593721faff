// Plain C++: runs everywhere, and is what the vector kernels are read against. No Winograd: it pays with vectors only.
#include <cmath>
#include <cstring>

#include "core/float_rows.h"
#include "int8_conv2d/int8_conv2d.h"

namespace pycompress::int8_matmul {
extern const Kernel kScalar;
}

#define PC_LAMBDA_INLINE
#define PC_UNROLL

namespace pycompress::int8_conv2d {
namespace {

struct F {
  using reg = float;
  static constexpr int lanes = 1;
  static reg load(const float* p) { return *p; }
  static reg load_first(const float* p, int) { return *p; }
  static void store(float* p, reg v) { *p = v; }
  static void store_first(float* p, int, reg v) { *p = v; }
  static reg set(float v) { return v; }
  static reg fma(reg a, reg b, reg c) { return std::fma(a, b, c); }
  static reg mac(reg a, reg b, reg c) { return a * b + c; }
  static reg add(reg a, reg b) { return a + b; }
  static reg mul(reg a, reg b) { return a * b; }
  static reg min(reg a, reg b) { return a < b ? a : b; }
  static reg max(reg a, reg b) { return a > b ? a : b; }  // NaN in a gives b, NaN in b stays
  static reg round(reg a) { return std::nearbyint(a); }
  static reg activate(reg y, Activation a) { return pycompress::activate(y, a); }
};

#include "int8_conv2d/float_simd.h"

float quantize_planes(const float* x, int64_t plane, int64_t row, int64_t channels, int64_t rows, int64_t pixels, float inverse,
                      int zero_point, int quant_min, char* dst, int64_t row_stride, int64_t pixel_stride) {
  const float lo = static_cast<float>(quant_min - zero_point), hi = static_cast<float>(127 - zero_point);
  float bad = 0.0f;
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t p = 0; p < pixels; ++p) {
      int16_t* d = reinterpret_cast<int16_t*>(dst + y * row_stride + p * pixel_stride);
      for (int64_t c = 0; c < channels; ++c) {
        const float v = x[c * plane + y * row + p];
        bad += v * 0.0f;
        d[c] = static_cast<int16_t>(F::round(F::min(F::max(v * inverse, lo), hi)));
      }
    }
  return bad;
}

void store_planes(const float* y, int64_t ld, int64_t pixels, int64_t cols, float* out, int64_t plane) {
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t p = 0; p < pixels; ++p) out[c * plane + p] = y[p * ld + c];
}

void quantize_out(const float* y, int64_t ld, int64_t rows, int64_t cols, float inverse, int zero_point, int quant_min, int8_t* out,
                  int64_t ldo) {
  const float lo = static_cast<float>(quant_min - zero_point), hi = static_cast<float>(127 - zero_point);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const float v = y[r * ld + c] * inverse;
      out[r * ldo + c] = static_cast<int8_t>(v == v ? static_cast<int>(F::round(F::min(F::max(v, lo), hi))) + zero_point : zero_point);
    }
}

void split_phases(const float* line, int64_t cols, int64_t phases, int64_t phase_step, float* dst) {
  for (int64_t f = 0; f < phases; ++f)
    for (int64_t x = f, i = f * phase_step; x < cols; x += phases) dst[i++] = line[x];
}

}  // namespace

extern const Kernel kScalar;
const Kernel kScalar = {
    "scalar",        Isa::scalar, &int8_matmul::kScalar, quantize_planes, store_planes,     add_f32, add_i8, quantize_out, center<int8_t>,
    center<int16_t>, round_row,   split_phases,          depthwise_plane, depthwise_pixels, 0,       {},     nullptr,      nullptr,
    nullptr,         nullptr};

}  // namespace pycompress::int8_conv2d
