// float16 as cuda_fp16.h has it: storage, conversions to nearest even, and the few operations on pairs that kernels use.
#pragma once
#include "cuda_runtime.h"

struct alignas(2) __half {
  uint16_t bits;
  __half() = default;
  __half(float value) {
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000u;
    const float size = std::fabs(value);
    if (size != size) {
      bits = 0x7fff;
    } else if (size >= 65520.0f) {
      bits = static_cast<uint16_t>(sign | 0x7c00u);
    } else if (size < 0x1p-14f) {  // subnormal: a multiple of 2^-24
      bits = static_cast<uint16_t>(sign | static_cast<unsigned>(std::nearbyintf(size * 0x1p24f)));
    } else {
      const unsigned u = __float_as_uint(size), kept = (u + 0xfffu + (u >> 13 & 1u)) >> 13;
      bits = static_cast<uint16_t>(sign | (kept - (112u << 10)));
    }
  }
  operator float() const {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float size = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -size : size;
  }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;
inline float __half2float(__half v) { return v; }
inline __half __float2half(float v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short u) {
  __half v;
  v.bits = u;
  return v;
}
