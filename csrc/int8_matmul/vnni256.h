// 256-bit vpdpbusd: activations as u8 (q + 128), weights s8, int32 sums that wrap and never saturate.
//
// The body of two kernels, which differ in the encoding of one instruction only: int8_matmul_avx_vnni.cpp (VEX) and
// int8_matmul_avx512_vnni256.cpp (EVEX). Each defines PC_VNNI256_TARGET and PC_DPBUSD before the include.
//
// Reading rows of floats is the AVX2 kernel's; what VNNI changes is written here.
#pragma once
#include <immintrin.h>

#include "core/activation_simd.h"
#include "core/float_rows.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {

extern const Kernel kAvx2;

namespace {

// 6 x 16: 12 accumulators, 2 vectors of b, 1 broadcast of a: 15 of 16 registers.
constexpr int kMr = 6, kNr = 16, kKr = 4;

float amax(const float* x, int64_t k) { return kAvx2.amax(x, k); }
void range(const float* x, int64_t k, float* low, float* high) { kAvx2.range(x, k, low, high); }
void widen(const void* src, DType dtype, int64_t n, float* dst) { kAvx2.widen(src, dtype, n, dst); }

PC_TARGET_BEGIN(PC_VNNI256_TARGET)

PC_INLINE __m256i quantize8(__m256 x, __m256 inverse, __m256 lo, __m256 hi) {
  // max/min return the second operand for NaN, so NaN ends as lo.
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, inverse), lo), hi));
}

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, int zero_point, int quant_min, void* dst) {
  uint8_t* d = static_cast<uint8_t*>(dst);
  const __m256 inv = _mm256_set1_ps(inverse), lo = _mm256_set1_ps(static_cast<float>(quant_min - zero_point)),
               hi = _mm256_set1_ps(static_cast<float>(127 - zero_point));
  const __m256i offset = _mm256_set1_epi16(static_cast<int16_t>(128 + zero_point));
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    __m256i q = _mm256_packs_epi32(quantize8(_mm256_loadu_ps(x + i), inv, lo, hi), quantize8(_mm256_loadu_ps(x + i + 8), inv, lo, hi));
    q = _mm256_permute4x64_epi64(_mm256_add_epi16(q, offset), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(d + i), _mm_packus_epi16(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
  }
  for (; i < k; ++i) d[i] = static_cast<uint8_t>(_mm256_extract_epi32(quantize8(_mm256_set1_ps(x[i]), inv, lo, hi), 0) + 128 + zero_point);
  for (; i < kp; ++i) d[i] = 0;
}

void load_row(const int8_t* a, int64_t k, int64_t kp, int, void* dst) {
  uint8_t* d = static_cast<uint8_t*>(dst);
  for (int64_t i = 0; i < k; ++i) d[i] = static_cast<uint8_t>(a[i] ^ 0x80);
  for (int64_t i = k; i < kp; ++i) d[i] = 0;
}

template <int R>
void tile_rows(const void* const* a, int segments, int64_t depth, const int8_t* b, int32_t* acc) {
  __m256i c[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = _mm256_setzero_si256();
  for (int s = 0; s < segments; ++s, a += R) {
    const char* x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = static_cast<const char*>(a[r]);
    for (int64_t i = 0; i < depth / kKr; ++i, b += kKr * kNr) {
      const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b));
      const __m256i b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 32));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i u = _mm256_set1_epi32(load32(x[r] + 4 * i));
        c[r][0] = PC_DPBUSD(c[r][0], u, b0);
        c[r][1] = PC_DPBUSD(c[r][1], u, b1);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc + r * kNr), c[r][0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc + r * kNr + 8), c[r][1]);
  }
}

void tile(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, int, int32_t* acc) {
  switch (rows) {
    case 1:
      return tile_rows<1>(a, segments, depth, b, acc);
    case 2:
      return tile_rows<2>(a, segments, depth, b, acc);
    case 3:
      return tile_rows<3>(a, segments, depth, b, acc);
    case 4:
      return tile_rows<4>(a, segments, depth, b, acc);
    case 5:
      return tile_rows<5>(a, segments, depth, b, acc);
    default:
      return tile_rows<6>(a, segments, depth, b, acc);
  }
}

template <Activation kActivation>
PC_INLINE void store_rows(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int c = 0; c < cols; c += 8) {
    const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(cols - c), lane);
    const __m256 sb = _mm256_maskload_ps(e.col_scale + c, m), bias = e.bias ? _mm256_maskload_ps(e.bias + c, m) : _mm256_setzero_ps();
    const __m256i sums = _mm256_maskload_epi32(e.column_sum + c, m);
    for (int r = 0; r < rows; ++r) {
      const __m256i extra = _mm256_mullo_epi32(sums, _mm256_set1_epi32(e.row_correction[r]));
      const __m256i sum = _mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(acc + r * kNr + c)), extra);
      const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(e.row_scale[r]), sb);
      const __m256 y = activate_avx2(_mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, bias), kActivation);
      if (cols - c >= 8)
        _mm256_storeu_ps(out + r * ldo + c, y);
      else
        _mm256_maskstore_ps(out + r * ldo + c, m, y);
    }
  }
}

void store_f32(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out,
               int64_t ldo){PC_WITH_ACTIVATION(e.activation, store_rows, acc, rows, cols, e, out, ldo)}

PC_TARGET_END

}  // namespace
}  // namespace pycompress::int8_matmul
