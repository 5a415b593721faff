// AVX2. Direct: the exact int16 tiles of int8_matmul, whose wide tile (int16 x int16 by vpmaddwd) serves Winograd as it is.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "core/activation_simd.h"
#include "int8_conv2d/int8_conv2d.h"

namespace pycompress::int8_matmul {
extern const Kernel kAvx2, kAvx2Bytes;
}

#if defined(__GNUC__)
#define PC_LAMBDA_INLINE __attribute__((always_inline))
#define PC_UNROLL _Pragma("GCC unroll 16")
#else
#define PC_LAMBDA_INLINE
#define PC_UNROLL
#endif

namespace pycompress::int8_conv2d {
namespace {

PC_TARGET_BEGIN("avx2,fma,f16c")

PC_INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct F {
  using reg = __m256;
  static constexpr int lanes = 8;
  static PC_INLINE reg load(const float* p) { return _mm256_loadu_ps(p); }
  static PC_INLINE reg load_first(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static PC_INLINE void store(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static PC_INLINE void store_first(float* p, int n, reg v) { _mm256_maskstore_ps(p, first(n), v); }
  static PC_INLINE reg set(float v) { return _mm256_set1_ps(v); }
  static PC_INLINE reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static PC_INLINE reg mac(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static PC_INLINE reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static PC_INLINE reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static PC_INLINE reg min(reg a, reg b) { return _mm256_min_ps(a, b); }
  static PC_INLINE reg max(reg a, reg b) { return _mm256_max_ps(a, b); }  // NaN in a gives b, NaN in b stays
  static PC_INLINE reg round(reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static PC_INLINE reg activate(reg y, Activation a) { return activate_avx2(y, a); }
};

#include "int8_conv2d/float_simd.h"
#include "int8_conv2d/winograd_simd.h"
#include "int8_conv2d/ymm_operands.h"  // NOLINT: after winograd_simd.h

void quantize_out(const float* y, int64_t ld, int64_t rows, int64_t cols, float inverse, int zero_point, int quant_min, int8_t* out,
                  int64_t ldo) {
  const __m256 inv = _mm256_set1_ps(inverse), lo = _mm256_set1_ps(static_cast<float>(quant_min - zero_point)),
               hi = _mm256_set1_ps(static_cast<float>(127 - zero_point));
  const __m256i zp = _mm256_set1_epi32(zero_point);
  for (int64_t r = 0; r < rows; ++r)
    for_vectors(cols, [&](int64_t c, int count) PC_LAMBDA_INLINE {
      const __m256 v = _mm256_mul_ps(load_n(y + r * ld + c, count), inv);
      const __m256 number = _mm256_and_ps(_mm256_min_ps(_mm256_max_ps(v, lo), hi), _mm256_cmp_ps(v, v, _CMP_ORD_Q));
      const __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32(number), zp);
      const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
      int8_t* o = out + r * ldo + c;
      alignas(8) int8_t bytes[8];
      _mm_storel_epi64(reinterpret_cast<__m128i*>(count == 8 ? o : bytes), _mm_packs_epi16(w, w));
      if (count < 8)
        for (int j = 0; j < count; ++j) o[j] = bytes[j];
    });
}

void store_planes(const float* y, int64_t ld, int64_t pixels, int64_t cols, float* out, int64_t plane) {
  // Columns outside: every column is a page of its own, so what goes to one is written together.
  for (int64_t c = 0; c < cols; c += 4) {
    for (int64_t p = 0; p < pixels; p += 8) {
      const __m256i m = first(pixels - p);
      // r[i]: lanes are 4 columns of pixels i and 4 + i; a 4x4 transpose in each lane then gives whole columns.
      __m256 r[4];
      PC_UNROLL
      for (int i = 0; i < 4; ++i)
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(y + (p + i) * ld + c)), _mm_loadu_ps(y + (p + 4 + i) * ld + c), 1);
      const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]), e = _mm256_unpacklo_ps(r[2], r[3]),
                   g = _mm256_unpackhi_ps(r[2], r[3]);
      const __m256 col[4] = {_mm256_shuffle_ps(a, e, 0x44), _mm256_shuffle_ps(a, e, 0xee), _mm256_shuffle_ps(b, g, 0x44),
                             _mm256_shuffle_ps(b, g, 0xee)};
      float* o = out + c * plane + p;
      if (cols - c >= 4 && pixels - p >= 8) {
        PC_UNROLL
        for (int i = 0; i < 4; ++i) _mm256_storeu_ps(o + i * plane, col[i]);
      } else {
        for (int i = 0; i < 4 && i < cols - c; ++i) _mm256_maskstore_ps(o + i * plane, m, col[i]);
      }
    }
  }
}

void split_phases(const float* line, int64_t cols, int64_t phases, int64_t phase_step, float* dst) {
  if (phases != 2) {
    for (int64_t f = 0; f < phases; ++f)
      for (int64_t x = f, i = f * phase_step; x < cols; x += phases) dst[i++] = line[x];
    return;
  }
  int64_t x = 0, i = 0;
  for (; x + 16 <= cols; x += 16, i += 8) {
    const __m256 a = _mm256_loadu_ps(line + x), b = _mm256_loadu_ps(line + x + 8);
    const __m256 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xdd);
    _mm256_storeu_ps(dst + i, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8)));
    _mm256_storeu_ps(dst + phase_step + i, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8)));
  }
  for (; x < cols; ++x) dst[x % 2 * phase_step + x / 2] = line[x];
}

// Winograd ------------------------------------------------------------------------------------------------------------

struct I32 {
  __m256i v;
  PC_INLINE I32 operator+(I32 o) const { return {_mm256_add_epi32(v, o.v)}; }
  PC_INLINE I32 operator-(I32 o) const { return {_mm256_sub_epi32(v, o.v)}; }
  template <int n>
  PC_INLINE I32 shl() const {
    return n == 1 ? I32{_mm256_add_epi32(v, v)} : I32{_mm256_slli_epi32(v, n)};
  }
};

void winograd_weight(const int8_t* panel, int cols, int64_t channels, int16_t* u, int64_t position_stride) {
  for (int64_t c = 0; c < channels; c += 2) {
    for (int half = 0; half < 2; ++half) {  // 8 columns of 2 channels
      I16 w[3][6];
      PC_UNROLL
      for (int x = 0; x < 3; ++x) {
        I16 g[3];
        PC_UNROLL
        for (int y = 0; y < 3; ++y)
          g[y].v = _mm256_cvtepi8_epi16(
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + ((y * 3 + x) * channels + c) * cols + half * 16)));
        weight_transform(g[0], g[1], g[2], w[x], 1);
      }
      PC_UNROLL
      for (int y = 0; y < 6; ++y) {
        I16 r[6];
        weight_transform(w[0][y], w[1][y], w[2][y], r, 1);
        PC_UNROLL
        for (int x = 0; x < 6; ++x)
          _mm256_store_si256(reinterpret_cast<__m256i*>(u + (y * 6 + x) * position_stride + c * 16 + half * 16), r[x].v);
      }
    }
  }
}

void winograd_tile(const int16_t* v, int64_t ld, int rows, int64_t channels, const int16_t* u, int32_t* acc) {
  const void* a[6];
  for (int r = 0; r < rows; ++r) a[r] = v + r * ld;
  int8_matmul::kAvx2.tile_wide(a, rows, 1, channels, u, 16, acc);
}

void winograd_output(const int32_t* m, int64_t position_stride, float image_scale, const float* scale, const float* bias,
                     Activation activation, float* y, int64_t row_stride, int64_t pixel_stride) {
  const __m256i ninth = _mm256_set1_epi32(kNinth);
  for (int half = 0; half < 16; half += 8) {
    const __m256 s = _mm256_mul_ps(_mm256_set1_ps(image_scale), _mm256_loadu_ps(scale + half)), b = _mm256_loadu_ps(bias + half);
    I32 w[6][4];  // w[column][row]
    PC_UNROLL
    for (int x = 0; x < 6; ++x) {
      I32 d[6];
      PC_UNROLL
      for (int r = 0; r < 6; ++r) d[r].v = _mm256_load_si256(reinterpret_cast<const __m256i*>(m + (r * 6 + x) * position_stride + half));
      output_transform(d, w[x], 1);
    }
    PC_UNROLL
    for (int r = 0; r < 4; ++r) {
      I32 d[6], out[4];
      PC_UNROLL
      for (int x = 0; x < 6; ++x) d[x] = w[x][r];
      output_transform(d, out, 1);
      PC_UNROLL
      for (int x = 0; x < 4; ++x) {
        const __m256i sum = _mm256_srai_epi32(_mm256_mullo_epi32(out[x].v, ninth), 6);
        const __m256 f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), s, b);
        _mm256_storeu_ps(y + r * row_stride + x * pixel_stride + half,
                         activation == Activation::relu ? _mm256_max_ps(_mm256_setzero_ps(), f) : f);
      }
    }
  }
  if (activation > Activation::relu)
    for (int r = 0; r < 4; ++r)
      for (int x = 0; x < 4; ++x) activate_run(y + r * row_stride + x * pixel_stride, 16, activation);
}

PC_TARGET_END

}  // namespace

extern const PixelKernel kPixelsAvx2;
extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2",
                      Isa::avx2,
                      &int8_matmul::kAvx2,
                      quantize_planes<int16_t>,
                      store_planes,
                      add_f32,
                      add_i8,
                      quantize_out,
                      center<int8_t>,
                      center<int16_t>,
                      round_row,
                      split_phases,
                      depthwise_plane,
                      depthwise_pixels,
                      6,
                      {1.0 / 24, 1.0 / 24, 10.0, 4.5, 32.0},
                      winograd_input<int16_t>,
                      winograd_weight,
                      winograd_tile,
                      winograd_output,
                      nullptr,
                      nullptr,
                      &kPixelsAvx2,
                      nullptr,
                      nullptr,
                      &int8_matmul::kAvx2Bytes};

}  // namespace pycompress::int8_conv2d
#endif
