// Scalar pieces that every record may use for the tail of a row. `static` on purpose: each file gets its own copy,
// compiled for its own target, so the linker can never hand an AVX copy to a baseline caller.
#pragma once
#include <cmath>
#include <cstring>

#include "core/types.h"

namespace pycompress {

static inline float activate(float y, Activation a) {
  switch (a) {
    case Activation::relu:
      return y < 0.0f ? 0.0f : y;  // keeps NaN
    case Activation::gelu:
      return 0.5f * y * (1.0f + std::erf(y * 0.70710678118654752f));
    case Activation::silu:
      return y / (1.0f + std::exp(-y));
    case Activation::relu6:
      return y < 0.0f ? 0.0f : y > 6.0f ? 6.0f : y;
    case Activation::hardswish:
      return y * (y < -3.0f ? 0.0f : y > 3.0f ? 6.0f : y + 3.0f) * (1.0f / 6.0f);
    default:
      return y;
  }
}

static inline float bf16_to_float(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, mantissa = h & 0x3ff;
  const int exponent = h >> 10 & 31;
  uint32_t u;
  if (exponent == 31) {
    u = sign | 0x7f800000u | mantissa << 13;
  } else if (exponent != 0) {
    u = sign | static_cast<uint32_t>(exponent + 112) << 23 | mantissa << 13;
  } else {  // subnormal: mantissa * 2^-24
    const float f = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even, overflow to infinity, NaN stays NaN.
static inline uint16_t float_to_f16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00;
  if (u >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above
  if (u < 0x38800000u) {                       // below 2^-14: adding 0.5 leaves mantissa * 2^24 in the low bits
    float v;
    std::memcpy(&v, &u, 4);
    v += 0.5f;
    std::memcpy(&u, &v, 4);
    return sign | static_cast<uint16_t>(u - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((u + 0xc8000fffu + (u >> 13 & 1)) >> 13);
}

static inline void widen_row(const void* src, DType dtype, int64_t n, float* dst) {
  const uint16_t* s = static_cast<const uint16_t*>(src);
  for (int64_t i = 0; i < n; ++i) dst[i] = dtype == DType::bf16 ? bf16_to_float(s[i]) : f16_to_float(s[i]);
}

static inline void narrow_row(const float* src, int64_t n, DType dtype, void* dst) {
  uint16_t* d = static_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; ++i) d[i] = dtype == DType::bf16 ? float_to_bf16(src[i]) : float_to_f16(src[i]);
}

}  // namespace pycompress
