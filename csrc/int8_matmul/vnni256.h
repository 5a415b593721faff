// 256-bit vpdpbusd: activations as u8 (q + 128), weights s8, int32 sums that wrap and never saturate.
//
// The body of two kernels, which differ in the encoding of one instruction only: int8_matmul_avx_vnni.cpp (VEX) and
// int8_matmul_avx512_vnni256.cpp (EVEX). Each defines PC_VNNI256_TARGET, PC_DPBUSD and PC_DPBUSD_TEXT before the include.
//
// Reading rows of floats is the AVX2 kernel's; what VNNI changes is written here.
#pragma once
#include <immintrin.h>

#include "core/activation_simd.h"
#include "core/float_rows.h"
#include "int8_matmul/fetch.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {

extern const Kernel kAvx2;

namespace {

// 6 x 16: 12 accumulators, 2 vectors of b, 1 broadcast of a: 15 of 16 registers.
constexpr int kMr = 6, kNr = 16, kKr = 4;

float amax(const float* x, int64_t k) { return kAvx2.amax(x, k); }
void range(const float* x, int64_t k, float* low, float* high) { kAvx2.range(x, k, low, high); }
void widen(const void* src, DType dtype, int64_t n, float* dst) { kAvx2.widen(src, dtype, n, dst); }
void narrow(const float* src, int64_t n, DType dtype, void* dst) { kAvx2.narrow(src, n, dtype, dst); }
void activate(float* y, int64_t rows, int cols, int64_t ld, Activation activation) { kAvx2.activate(y, rows, cols, ld, activation); }

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

// Dynamic and symmetric, where nothing needs clamping: |x| * inverse rounds to 127 at most.
PC_INLINE __m256i quantize8(const float* x, __m256 inverse) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse)); }

void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, void* dst, int64_t stride, float* scales) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works in 128-bit lanes
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(0x80));
  uint8_t* d = static_cast<uint8_t*>(dst);
  for (int64_t r = 0; r < rows; ++r, x += ldx, d += stride) {
    float inverse;
    scales[r] = symmetric_scale(amax(x, k), &inverse);
    const __m256 inv = _mm256_set1_ps(inverse);
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
      const __m256i low = _mm256_packs_epi32(quantize8(x + i, inv), quantize8(x + i + 8, inv));
      const __m256i high = _mm256_packs_epi32(quantize8(x + i + 16, inv), quantize8(x + i + 24, inv));
      const __m256i q = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(d + i), _mm256_xor_si256(q, offset));
    }
    for (; i < k; ++i) d[i] = static_cast<uint8_t>(_mm_cvtss_si32(_mm_set_ss(x[i] * inverse)) + 128);
    for (; i < kp; ++i) d[i] = 0;
  }
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

// tile and store_f32 in one: the sums leave as floats without passing memory. The order of the steps is one that compilers may not
// change: next to an epilogue they run out of registers and spill.
#if defined(__GNUC__)
PC_INLINE void dot(__m256i& c0, __m256i& c1, const char* four, __m256i b0, __m256i b1) {
  __m256i u;
  __asm__ volatile("vpbroadcastd %[four],%[u]\n" PC_DPBUSD_TEXT " %[b0],%[u],%[c0]\n" PC_DPBUSD_TEXT " %[b1],%[u],%[c1]"
                   : [c0] "+x"(c0), [c1] "+x"(c1), [u] "=&x"(u)
                   : [four] "m"(*reinterpret_cast<const char (*)[4]>(four)), [b0] "x"(b0), [b1] "x"(b1));
}
#else
PC_INLINE void dot(__m256i& c0, __m256i& c1, const char* four, __m256i b0, __m256i b1) {
  const __m256i u = _mm256_set1_epi32(load32(four));
  c0 = PC_DPBUSD(c0, u, b0);
  c1 = PC_DPBUSD(c1, u, b1);
}
#endif

template <int R, bool kRelu>
void linear_rows(const char* a, int64_t stride, int64_t depth, const int8_t* b, Fetch fetch, int used, const float* row_scale,
                 const int32_t* correction, const Epilogue& e, float* out, int64_t ldo) {
  __m256i c[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = _mm256_setzero_si256();
  const char *x = a, *x3 = a + 3 * stride;
  for (int64_t i = 0; i < depth / kKr; ++i, b += kKr * kNr, x += kKr, x3 += kKr) {
    _mm_prefetch(reinterpret_cast<const char*>(fetch.from), _MM_HINT_T0);
    fetch.from += fetch.step;
    const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b));
    const __m256i b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 32));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) dot(c[r][0], c[r][1], (r < 3 ? x : x3) + r % 3 * stride, b0, b1);
  }
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(used - 8 * v), lane);
    const __m256 sb = _mm256_maskload_ps(e.col_scale + 8 * v, m);
    const __m256 bias = e.bias ? _mm256_maskload_ps(e.bias + 8 * v, m) : _mm256_setzero_ps();
    const __m256i sums = _mm256_maskload_epi32(e.column_sum + 8 * v, m);
    __m256i extra = _mm256_mullo_epi32(sums, _mm256_set1_epi32(correction[0]));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // Neighbouring rows nearly always share their zero point, and vpmulld is slow.
      if (r > 0 && correction[r] != correction[r - 1]) extra = _mm256_mullo_epi32(sums, _mm256_set1_epi32(correction[r]));
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(c[r][v], extra));
      const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(row_scale[r]), sb);
      const __m256 y = activate_avx2(_mm256_fmadd_ps(sum, scale, bias), kRelu ? Activation::relu : Activation::none);
      if (used >= 8 * v + 8)
        _mm256_storeu_ps(out + r * ldo + 8 * v, y);
      else
        _mm256_maskstore_ps(out + r * ldo + 8 * v, m, y);
    }
  }
}

template <bool kRelu>
void linear_panel(const char* a, int64_t stride, int64_t rows, int64_t depth, const int8_t* b, int used, const Epilogue& e, float* out,
                  int64_t ldo) {
  static constexpr decltype(&linear_rows<1, kRelu>) kTiles[] = {linear_rows<1, kRelu>, linear_rows<2, kRelu>, linear_rows<3, kRelu>,
                                                                linear_rows<4, kRelu>, linear_rows<5, kRelu>, linear_rows<6, kRelu>};
  Fetch fetch(b, depth / kKr, kKr * kNr, ceil_div(rows, kMr));
  int count = 0;
  for (int64_t r = 0; r < rows; r += count, fetch.from += depth / kKr * fetch.step) {
    count = next_rows(rows - r);
    kTiles[count - 1](a + r * stride, stride, depth, b, fetch, used, e.row_scale + r, e.row_correction + r, e, out + r * ldo, ldo);
  }
}

void linear(const void* a, int64_t stride, int64_t rows, int64_t depth, const int8_t* b, int used, const Epilogue& e, float* out,
            int64_t ldo) {
  const char* x = static_cast<const char*>(a);
  e.activation == Activation::relu ? linear_panel<true>(x, stride, rows, depth, b, used, e, out, ldo)
                                   : linear_panel<false>(x, stride, rows, depth, b, used, e, out, ldo);
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
