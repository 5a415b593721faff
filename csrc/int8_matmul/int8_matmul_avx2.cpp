// AVX2: activations as int16 (q - zero_point), weights widened from int8 on load, vpmaddwd into int32.
// Exact for every input: a pair sum is at most 2 * 255 * 128 and never passes int32, unlike vpmaddubsw's int16.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/activation_simd.h"
#include "core/float_rows.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {
namespace {

// 6 x 16: 12 accumulators, 2 vectors of b, 1 broadcast of a, 1 product: all 16 registers.
constexpr int kMr = 6, kNr = 16, kKr = 2;

PC_TARGET_BEGIN("avx2,fma,f16c")

float amax(const float* x, int64_t k) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i best = _mm256_setzero_si256(), best1 = best;
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    best = _mm256_max_epu32(best, _mm256_and_si256(mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
    best1 = _mm256_max_epu32(best1, _mm256_and_si256(mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + 8))));
  }
  best = _mm256_max_epu32(best, best1);
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), best);
  uint32_t top = 0;
  for (uint32_t v : lanes) top = v > top ? v : top;
  for (; i < k; ++i) {
    uint32_t u;
    std::memcpy(&u, x + i, 4);
    u &= 0x7fffffffu;
    top = u > top ? u : top;
  }
  float f;
  std::memcpy(&f, &top, 4);
  return f;
}

void range(const float* x, int64_t k, float* low, float* high) {
  __m256 lo = _mm256_setzero_ps(), hi = lo;
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    lo = _mm256_min_ps(lo, v);
    hi = _mm256_max_ps(hi, v);
  }
  alignas(32) float l[8], h[8];
  _mm256_store_ps(l, lo);
  _mm256_store_ps(h, hi);
  for (int j = 1; j < 8; ++j) {
    l[0] = l[j] < l[0] ? l[j] : l[0];
    h[0] = h[j] > h[0] ? h[j] : h[0];
  }
  for (; i < k; ++i) {
    l[0] = x[i] < l[0] ? x[i] : l[0];
    h[0] = x[i] > h[0] ? x[i] : h[0];
  }
  *low = l[0], *high = h[0];
}

PC_INLINE __m256i quantize8(__m256 x, __m256 inverse, __m256 lo, __m256 hi) {
  // max/min return the second operand for NaN, so NaN ends as lo.
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, inverse), lo), hi));
}

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, int zero_point, int quant_min, void* dst) {
  int16_t* d = static_cast<int16_t*>(dst);
  const __m256 inv = _mm256_set1_ps(inverse), lo = _mm256_set1_ps(static_cast<float>(quant_min - zero_point)),
               hi = _mm256_set1_ps(static_cast<float>(127 - zero_point));
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const __m256i q =
        _mm256_packs_epi32(quantize8(_mm256_loadu_ps(x + i), inv, lo, hi), quantize8(_mm256_loadu_ps(x + i + 8), inv, lo, hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(d + i), _mm256_permute4x64_epi64(q, 0xd8));
  }
  for (; i < k; ++i) {
    const __m256i q = quantize8(_mm256_set1_ps(x[i]), inv, lo, hi);
    d[i] = static_cast<int16_t>(_mm256_extract_epi32(q, 0));
  }
  for (; i < kp; ++i) d[i] = 0;
}

void load_row(const int8_t* a, int64_t k, int64_t kp, int zero_point, void* dst) {
  int16_t* d = static_cast<int16_t*>(dst);
  const __m256i z = _mm256_set1_epi16(static_cast<int16_t>(zero_point));
  int64_t i = 0;
  for (; i + 16 <= k; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(d + i),
                        _mm256_sub_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i))), z));
  for (; i < k; ++i) d[i] = static_cast<int16_t>(a[i] - zero_point);
  for (; i < kp; ++i) d[i] = 0;
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
    for (int64_t i = 0; i < depth / kKr; ++i, b += 32) {
      const __m256i b0 = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(b)));
      const __m256i b1 = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(b + 16)));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i v = _mm256_set1_epi32(load32(x[r] + 4 * i));
        c[r][0] = _mm256_add_epi32(c[r][0], _mm256_madd_epi16(v, b0));
        c[r][1] = _mm256_add_epi32(c[r][1], _mm256_madd_epi16(v, b1));
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

void widen_panel(const int8_t* b, int64_t count, void* wide) {
  int16_t* w = static_cast<int16_t*>(wide);
  for (int64_t i = 0; i < count; i += 16)
    _mm256_store_si256(reinterpret_cast<__m256i*>(w + i), _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(b + i))));
}

#if defined(__GNUC__) && defined(__x86_64__)
// By hand: compilers hoist the products, run out of registers and spill accumulators (20 instead of 25 MAC per cycle).
#define PC_ROW(a, c0, c1)                 \
  "vpbroadcastd (%[" #a                   \
  "],%[i]),%%ymm14\n"                     \
  "vpmaddwd %%ymm12,%%ymm14,%%ymm15\n"    \
  "vpmaddwd %%ymm13,%%ymm14,%%ymm14\n"    \
  "vpaddd %%ymm15,%%ymm" #c0 ",%%ymm" #c0 \
  "\n"                                    \
  "vpaddd %%ymm14,%%ymm" #c1 ",%%ymm" #c1 "\n"
#define PC_STORE(r, c0, c1)  \
  "vmovdqa %%ymm" #c0 "," #r \
  "*64(%[acc])\n"            \
  "vmovdqa %%ymm" #c1 "," #r "*64+32(%[acc])\n"
#define PC_CLEAR(c) "vpxor %%ymm" #c ",%%ymm" #c ",%%ymm" #c "\n"

// acc[6][16] (+)= six rows of a times one wide panel, over one segment.
void tile6_wide(const void* const* a, int64_t depth, const void* wide, int32_t* acc) {
  const char *a0 = static_cast<const char*>(a[0]), *a1 = static_cast<const char*>(a[1]), *a2 = static_cast<const char*>(a[2]),
             *a3 = static_cast<const char*>(a[3]), *a4 = static_cast<const char*>(a[4]), *a5 = static_cast<const char*>(a[5]);
  const int64_t bytes = depth * 2;
  a0 += bytes, a1 += bytes, a2 += bytes, a3 += bytes, a4 += bytes, a5 += bytes;
  int64_t i = -bytes;
  __asm__ volatile(
      PC_CLEAR(0) PC_CLEAR(1) PC_CLEAR(2) PC_CLEAR(3) PC_CLEAR(4) PC_CLEAR(5) PC_CLEAR(6) PC_CLEAR(7) PC_CLEAR(8) PC_CLEAR(9) PC_CLEAR(10)
          PC_CLEAR(11)
      "test %[i],%[i]\n"
      "jz 2f\n"
      ".p2align 5\n"
      "1:\n"
      "vmovdqa (%[b]),%%ymm12\n"
      "vmovdqa 32(%[b]),%%ymm13\n"
      PC_ROW(a0, 0, 1) PC_ROW(a1, 2, 3) PC_ROW(a2, 4, 5) PC_ROW(a3, 6, 7) PC_ROW(a4, 8, 9) PC_ROW(a5, 10, 11)
      "add $64,%[b]\n"
      "add $4,%[i]\n"
      "jnz 1b\n"
      "2:\n"
      PC_STORE(0, 0, 1) PC_STORE(1, 2, 3) PC_STORE(2, 4, 5) PC_STORE(3, 6, 7) PC_STORE(4, 8, 9) PC_STORE(5, 10, 11)
      : [i] "+r"(i), [b] "+r"(wide)
      : [a0] "r"(a0), [a1] "r"(a1), [a2] "r"(a2), [a3] "r"(a3), [a4] "r"(a4), [a5] "r"(a5), [acc] "r"(acc)
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
        "xmm14", "xmm15");
}
#undef PC_ROW
#undef PC_STORE
#undef PC_CLEAR
#define PC_HAVE_TILE6 1
#else
#define PC_HAVE_TILE6 0
#endif

// The same with intrinsics: any number of rows, several segments, other compilers.
template <int R>
void rows_wide(const void* const* a, int segments, int64_t depth, const void* wide, int32_t* acc) {
  const __m256i* b = static_cast<const __m256i*>(wide);
  __m256i c[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = _mm256_setzero_si256();
  for (int s = 0; s < segments; ++s, a += R) {
    const char* x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = static_cast<const char*>(a[r]);
    for (int64_t i = 0; i < depth / kKr; ++i, b += 2) {
      const __m256i b0 = _mm256_load_si256(b), b1 = _mm256_load_si256(b + 1);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i v = _mm256_set1_epi32(load32(x[r] + 4 * i));
        c[r][0] = _mm256_add_epi32(c[r][0], _mm256_madd_epi16(v, b0));
        c[r][1] = _mm256_add_epi32(c[r][1], _mm256_madd_epi16(v, b1));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc + r * kNr), c[r][0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc + r * kNr + 8), c[r][1]);
  }
}

void tile_wide(const void* const* a, int rows, int segments, int64_t depth, const void* wide, int, int32_t* acc) {
#if PC_HAVE_TILE6
  if (rows == 6 && segments == 1) return tile6_wide(a, depth, wide, acc);
#endif
  switch (rows) {
    case 1:
      return rows_wide<1>(a, segments, depth, wide, acc);
    case 2:
      return rows_wide<2>(a, segments, depth, wide, acc);
    case 3:
      return rows_wide<3>(a, segments, depth, wide, acc);
    case 4:
      return rows_wide<4>(a, segments, depth, wide, acc);
    case 5:
      return rows_wide<5>(a, segments, depth, wide, acc);
    default:
      return rows_wide<6>(a, segments, depth, wide, acc);
  }
}

template <Activation kActivation>
PC_INLINE void store_rows(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int c = 0; c < cols; c += 8) {
    const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(cols - c), lane);
    const __m256 sb = _mm256_maskload_ps(e.col_scale + c, m), bias = e.bias ? _mm256_maskload_ps(e.bias + c, m) : _mm256_setzero_ps();
    for (int r = 0; r < rows; ++r) {
      const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(e.row_scale[r]), sb);
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(acc + r * kNr + c)));
      const __m256 y = activate_avx2(_mm256_fmadd_ps(sum, scale, bias), kActivation);
      if (cols - c >= 8)
        _mm256_storeu_ps(out + r * ldo + c, y);
      else
        _mm256_maskstore_ps(out + r * ldo + c, m, y);
    }
  }
}

void store_f32(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  PC_WITH_ACTIVATION(e.activation, store_rows, acc, rows, cols, e, out, ldo)
}

void widen(const void* src, DType dtype, int64_t n, float* dst) {
  const uint16_t* s = static_cast<const uint16_t*>(src);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i));
    _mm256_storeu_ps(dst + i,
                     dtype == DType::bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)) : _mm256_cvtph_ps(h));
  }
  for (; i < n; ++i) dst[i] = dtype == DType::bf16 ? bf16_to_float(s[i]) : f16_to_float(s[i]);
}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2",       Isa::avx2, kMr,   kNr,  16,        kKr,        2,           amax,     range,
                      quantize_row, load_row,  widen, tile, store_f32, narrow_row, widen_panel, tile_wide};

}  // namespace pycompress::int8_matmul
#endif
