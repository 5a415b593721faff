// AVX-512 VNNI. Direct: the u8 x s8 tiles of int8_matmul. Winograd: int16 x int16 by vpdpwssd, which wraps, as winograd.cpp wants.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "core/activation_simd.h"
#include "int8_conv2d/int8_conv2d.h"
#include "int8_conv2d/planes.h"

namespace pycompress::int8_matmul {
extern const Kernel kAvx512Vnni;
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

PC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "int8_conv2d/zmm_operands.h"

struct F {
  using reg = __m512;
  static constexpr int lanes = 16;
  static PC_INLINE reg load(const float* p) { return _mm512_loadu_ps(p); }
  static PC_INLINE reg load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static PC_INLINE void store(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static PC_INLINE void store_first(float* p, int n, reg v) { _mm512_mask_storeu_ps(p, first(n), v); }
  static PC_INLINE reg set(float v) { return _mm512_set1_ps(v); }
  static PC_INLINE reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static PC_INLINE reg mac(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static PC_INLINE reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static PC_INLINE reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static PC_INLINE reg min(reg a, reg b) { return _mm512_min_ps(a, b); }
  static PC_INLINE reg max(reg a, reg b) { return _mm512_max_ps(a, b); }  // NaN in a gives b, NaN in b stays
  static PC_INLINE reg round(reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static PC_INLINE reg activate(reg y, Activation a) { return activate_avx512(y, a); }
};

#include "int8_conv2d/float_simd.h"
#include "int8_conv2d/winograd_simd.h"

PC_INLINE void put(char* d, int64_t i, int64_t count, int64_t pixel_stride, __m128i v) {
  if (i < count) _mm_storeu_si128(reinterpret_cast<__m128i*>(d + i * pixel_stride), v);
}

// Up to 16 channels of up to 16 pixels.
template <bool kWhole>
PC_INLINE void quantize_block(const Quantizer& q, const float* x, int64_t plane, int64_t channels, int64_t pixels, char* d,
                              int64_t pixel_stride, __m512* bad) {
  const __mmask16 m = first(pixels);
  __m512i r[4];
  PC_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_setzero_si512();
    if (kWhole || i * 4 < channels) r[i] = quantize4<kWhole>(q, x + i * 4 * plane, plane, channels - i * 4, m, -16 * plane, bad[i]);
  }
  // 4x4 dwords within each lane: out[j] lane l = 16 channels of pixel 4 l + j
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]), e = _mm512_unpackhi_epi32(r[0], r[1]),
                g = _mm512_unpackhi_epi32(r[2], r[3]);
  const __m512i out[4] = {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b), _mm512_unpacklo_epi64(e, g),
                          _mm512_unpackhi_epi64(e, g)};
  const int64_t count = kWhole ? 16 : pixels;
  PC_UNROLL
  for (int j = 0; j < 4; ++j) put(d, j, count, pixel_stride, _mm512_castsi512_si128(out[j]));
  PC_UNROLL
  for (int j = 0; j < 4; ++j) put(d, 4 + j, count, pixel_stride, _mm512_extracti32x4_epi32(out[j], 1));
  PC_UNROLL
  for (int j = 0; j < 4; ++j) put(d, 8 + j, count, pixel_stride, _mm512_extracti32x4_epi32(out[j], 2));
  PC_UNROLL
  for (int j = 0; j < 4; ++j) put(d, 12 + j, count, pixel_stride, _mm512_extracti32x4_epi32(out[j], 3));
}

float quantize_planes(const float* x, int64_t plane, int64_t row, int64_t channels, int64_t rows, int64_t pixels, float inverse,
                      int zero_point, int quant_min, char* dst, int64_t row_stride, int64_t pixel_stride) {
  const Quantizer q(inverse, zero_point, quant_min);
  __m512 bad[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  // The incomplete block of channels first: what its stores write too much is overwritten by the next pixel's blocks.
  for (int64_t c = channels % 16 ? channels / 16 * 16 : channels - 16; c >= 0; c -= 16) {
    for (int64_t y = 0; y < rows; ++y) {
      const float* f = x + c * plane + y * row;
      char* d = dst + y * row_stride + c;
      int64_t p = 0;
      if (channels - c >= 16)
        for (; p + 16 <= pixels; p += 16) quantize_block<true>(q, f + p, plane, 16, 16, d + p * pixel_stride, pixel_stride, bad);
      for (; p < pixels; p += 16) quantize_block<false>(q, f + p, plane, channels - c, pixels - p, d + p * pixel_stride, pixel_stride, bad);
    }
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(bad[0], bad[1]), _mm512_add_ps(bad[2], bad[3])));
}

void quantize_out(const float* y, int64_t ld, int64_t rows, int64_t cols, float inverse, int zero_point, int quant_min, int8_t* out,
                  int64_t ldo) {
  const __m512 inv = _mm512_set1_ps(inverse), lo = _mm512_set1_ps(static_cast<float>(quant_min - zero_point)),
               hi = _mm512_set1_ps(static_cast<float>(127 - zero_point));
  const __m512i zp = _mm512_set1_epi32(zero_point);
  for (int64_t r = 0; r < rows; ++r)
    for_vectors(cols, [&](int64_t c, int count) PC_LAMBDA_INLINE {
      const __m512 v = _mm512_mul_ps(load_n(y + r * ld + c, count), inv);
      const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
      const __m512i q = _mm512_maskz_cvtps_epi32(number, _mm512_min_ps(_mm512_max_ps(v, lo), hi));
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(q, zp));
      int8_t* o = out + r * ldo + c;
      if (count == 16)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(o), bytes);
      else
        _mm_mask_storeu_epi8(o, first(count), bytes);
    });
}

PC_INLINE __m512 low_pairs(__m512 a, __m512 b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
PC_INLINE __m512 high_pairs(__m512 a, __m512 b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }

void store_planes(const float* y, int64_t ld, int64_t pixels, int64_t cols, float* out, int64_t plane) {
  // Columns outside: every column is a page of its own, so what goes to one is written together.
  for (int64_t c = 0; c < cols; c += 4) {
    for (int64_t p = 0; p < pixels; p += 16) {
      const __mmask16 m = first(pixels - p);
      // r[i]: lane l = 4 columns of pixel 4 l + i; a 4x4 transpose in each lane then gives whole columns.
      __m512 r[4];
      PC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* s = y + (p + i) * ld + c;
        __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(s));
        v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(s + 4 * ld));
        v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(s + 8 * ld));
        r[i] = _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(s + 12 * ld));
      }
      const __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]), e = _mm512_unpacklo_ps(r[2], r[3]),
                   g = _mm512_unpackhi_ps(r[2], r[3]);
      const __m512 col[4] = {low_pairs(a, e), high_pairs(a, e), low_pairs(b, g), high_pairs(b, g)};
      float* o = out + c * plane + p;
      if (cols - c >= 4 && m == 0xffff) {
        PC_UNROLL
        for (int i = 0; i < 4; ++i) _mm512_storeu_ps(o + i * plane, col[i]);
      } else {
        for (int i = 0; i < 4 && i < cols - c; ++i) _mm512_mask_storeu_ps(o + i * plane, m, col[i]);
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
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int64_t x = 0, i = 0; x < cols; x += 32, i += 16) {
    const __m512 a = _mm512_maskz_loadu_ps(first(cols - x), line + x),
                 b = _mm512_maskz_loadu_ps(first(cols - x - 16 > 0 ? cols - x - 16 : 0), line + x + 16);
    _mm512_storeu_ps(dst + i, _mm512_permutex2var_ps(a, even, b));
    _mm512_storeu_ps(dst + phase_step + i, _mm512_permutex2var_ps(a, odd, b));
  }
}

// Winograd ------------------------------------------------------------------------------------------------------------

struct I16 {
  __m512i v;
  PC_INLINE I16 operator+(I16 o) const { return {_mm512_add_epi16(v, o.v)}; }
  PC_INLINE I16 operator-(I16 o) const { return {_mm512_sub_epi16(v, o.v)}; }
  template <int n>
  PC_INLINE I16 shl() const {
    return n == 1 ? I16{_mm512_add_epi16(v, v)} : I16{_mm512_slli_epi16(v, n)};
  }
};

struct I32 {
  __m512i v;
  PC_INLINE I32 operator+(I32 o) const { return {_mm512_add_epi32(v, o.v)}; }
  PC_INLINE I32 operator-(I32 o) const { return {_mm512_sub_epi32(v, o.v)}; }
  template <int n>
  PC_INLINE I32 shl() const {
    return n == 1 ? I32{_mm512_add_epi32(v, v)} : I32{_mm512_slli_epi32(v, n)};
  }
};

void winograd_input(const void* src, int64_t row_stride, int64_t pixel_stride, int64_t channels, int zero_point, int16_t* v,
                    int64_t position_stride) {
  const __m512i offset = _mm512_set1_epi16(static_cast<int16_t>(128 + zero_point));
  for (int64_t c = 0; c < channels; c += 32) {
    const __mmask32 m = channels - c >= 32 ? ~__mmask32{0} : (__mmask32{1} << (channels - c)) - 1;
    I16 w[6][6];  // w[column][row]: the columns are done, the rows are not
    PC_UNROLL
    for (int x = 0; x < 6; ++x) {
      I16 d[6];
      PC_UNROLL
      for (int y = 0; y < 6; ++y) {
        const char* p = static_cast<const char*>(src) + y * row_stride + x * pixel_stride + c;
        d[y].v = _mm512_sub_epi16(_mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(m, p)), offset);
      }
      input_transform(d, w[x], 1);
    }
    PC_UNROLL
    for (int y = 0; y < 6; ++y) {
      I16 d[6], r[6];
      PC_UNROLL
      for (int x = 0; x < 6; ++x) d[x] = w[x][y];
      input_transform(d, r, 1);
      PC_UNROLL
      for (int x = 0; x < 6; ++x) _mm512_mask_storeu_epi16(v + (y * 6 + x) * position_stride + c, m, r[x].v);
    }
  }
}

void winograd_weight(const int8_t* panel, int cols, int64_t channels, int16_t* u, int64_t position_stride) {
  // Four channels of 16 columns in 64 bytes; the shuffles put the bytes of two of them into the upper halves of words.
  const __m512i pairs[2] = {_mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13)),
                            _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15))};
  for (int64_t c = 0; c < channels; c += 4) {
    for (int half = 0; half < 2; ++half) {
      I16 w[3][6];
      PC_UNROLL
      for (int x = 0; x < 3; ++x) {
        I16 g[3];
        PC_UNROLL
        for (int y = 0; y < 3; ++y) {
          const __m512i b = _mm512_loadu_si512(panel + ((y * 3 + x) * channels + c) * cols);
          g[y].v = _mm512_srai_epi16(_mm512_shuffle_epi8(b, pairs[half]), 8);
        }
        weight_transform(g[0], g[1], g[2], w[x], 1);
      }
      PC_UNROLL
      for (int y = 0; y < 6; ++y) {
        I16 r[6];
        weight_transform(w[0][y], w[1][y], w[2][y], r, 1);
        PC_UNROLL
        for (int x = 0; x < 6; ++x) _mm512_store_si512(u + (y * 6 + x) * position_stride + (c / 2 + half) * 32, r[x].v);
      }
    }
  }
}

// One or two blocks of 16 columns: with two, 12 rows take 14 loads for 24 products instead of 13 for 12.
template <int R, int B>
void winograd_rows(const int16_t* v, int64_t ld, int64_t channels, const int16_t* u, int64_t u_step, int32_t* acc, int64_t acc_step) {
  __m512i c[R][B];
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    PC_UNROLL
    for (int j = 0; j < B; ++j) c[r][j] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < channels; i += 2, v += 2, u += 32) {
    __m512i b[B];
    PC_UNROLL
    for (int j = 0; j < B; ++j) b[j] = _mm512_load_si512(u + j * u_step);
    PC_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, v + r * ld, 4);
      const __m512i x = _mm512_set1_epi32(pair);
      PC_UNROLL
      for (int j = 0; j < B; ++j) c[r][j] = _mm512_dpwssd_epi32(c[r][j], b[j], x);
    }
  }
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    PC_UNROLL
    for (int j = 0; j < B; ++j) _mm512_store_si512(acc + j * acc_step + r * 16, c[r][j]);
  }
}

template <int B>
PC_INLINE void winograd_blocks(const int16_t* v, int64_t ld, int rows, int64_t channels, const int16_t* u, int64_t u_step, int32_t* acc,
                               int64_t acc_step) {
  using Rows = void (*)(const int16_t*, int64_t, int64_t, const int16_t*, int64_t, int32_t*, int64_t);
  static constexpr Rows table[12] = {winograd_rows<1, B>, winograd_rows<2, B>,  winograd_rows<3, B>,  winograd_rows<4, B>,
                                     winograd_rows<5, B>, winograd_rows<6, B>,  winograd_rows<7, B>,  winograd_rows<8, B>,
                                     winograd_rows<9, B>, winograd_rows<10, B>, winograd_rows<11, B>, winograd_rows<12, B>};
  table[rows - 1](v, ld, channels, u, u_step, acc, acc_step);
}

void winograd_tile(const int16_t* v, int64_t ld, int rows, int64_t channels, const int16_t* u, int32_t* acc) {
  winograd_blocks<1>(v, ld, rows, channels, u, 0, acc, 0);
}

void winograd_tile_pair(const int16_t* v, int64_t ld, int rows, int64_t channels, const int16_t* u, int64_t u_step, int32_t* acc,
                        int64_t acc_step) {
  winograd_blocks<2>(v, ld, rows, channels, u, u_step, acc, acc_step);
}

void winograd_output(const int32_t* m, int64_t position_stride, float image_scale, const float* scale, const float* bias,
                     Activation activation, float* y, int64_t row_stride, int64_t pixel_stride) {
  const __m512 s = _mm512_mul_ps(_mm512_set1_ps(image_scale), _mm512_loadu_ps(scale)), b = _mm512_loadu_ps(bias);
  const __m512i ninth = _mm512_set1_epi32(kNinth);
  I32 w[6][4];  // w[column][row]
  PC_UNROLL
  for (int x = 0; x < 6; ++x) {
    I32 d[6];
    PC_UNROLL
    for (int r = 0; r < 6; ++r) d[r].v = _mm512_load_si512(m + (r * 6 + x) * position_stride);
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
      const __m512i sum = _mm512_srai_epi32(_mm512_mullo_epi32(out[x].v, ninth), 6);
      const __m512 f = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s, b);
      _mm512_storeu_ps(y + r * row_stride + x * pixel_stride, activation == Activation::relu ? _mm512_max_ps(_mm512_setzero_ps(), f) : f);
    }
  }
  if (activation > Activation::relu)
    for (int r = 0; r < 4; ++r)
      for (int x = 0; x < 4; ++x) activate_run(y + r * row_stride + x * pixel_stride, 16, activation);
}

PC_TARGET_END

}  // namespace

// Emerald Rapids: shuffles and vector arithmetic share the two pipes of the products, and 36 streams into L2 are written slowly.
constexpr Kernel::Cost kGoldenCove = {1.0 / 110, 1.0 / 43, 6.2, 5.0, 11.5};

extern const PlaneKernel kPlanesAvx512Vnni;
extern const PixelKernel kPixelsAvx512Vnni;
extern const TileKernel kTilesAvx512Vnni;
extern const Kernel kAvx512Vnni;
const Kernel kAvx512Vnni = {"avx512_vnni",
                            Isa::avx512_vnni,
                            &int8_matmul::kAvx512Vnni,
                            quantize_planes,
                            store_planes,
                            add_f32,
                            add_i8,
                            quantize_out,
                            center<int8_t>,
                            center<uint8_t>,
                            round_row,
                            split_phases,
                            depthwise_plane,
                            depthwise_pixels,
                            12,
                            {1.0 / 56, 1.0 / 28, 5.0, 2.5, 16.0},
                            winograd_input,
                            winograd_weight,
                            winograd_tile,
                            winograd_output,
                            &kPlanesAvx512Vnni,
                            winograd_tile_pair,
                            &kPixelsAvx512Vnni,
                            &kGoldenCove,
                            &kTilesAvx512Vnni};

}  // namespace pycompress::int8_conv2d
#endif
