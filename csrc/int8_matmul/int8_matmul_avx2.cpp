// AVX2: activations as int16 (q - zero_point), weights widened from int8 on load, vpmaddwd into int32.
// Exact for every input: a pair sum is at most 2 * 255 * 128 and never passes int32, unlike vpmaddubsw's int16.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/activation_simd.h"
#include "core/half_simd.h"
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
  __m256 lo = _mm256_setzero_ps(), hi = lo, lo1 = lo, hi1 = lo;
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const __m256 v = _mm256_loadu_ps(x + i), w = _mm256_loadu_ps(x + i + 8);
    lo = _mm256_min_ps(lo, v), lo1 = _mm256_min_ps(lo1, w);
    hi = _mm256_max_ps(hi, v), hi1 = _mm256_max_ps(hi1, w);
  }
  lo = _mm256_min_ps(lo, lo1), hi = _mm256_max_ps(hi, hi1);
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

void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, void* dst, int64_t stride, float* scales) {
  for (int64_t r = 0; r < rows; ++r, x += ldx) {
    int16_t* d = reinterpret_cast<int16_t*>(static_cast<char*>(dst) + r * stride);
    float inverse;
    scales[r] = symmetric_scale(amax(x, k), &inverse);
    const __m256 inv = _mm256_set1_ps(inverse);
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
      const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inv));
      const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inv));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(d + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    }
    for (; i < k; ++i) d[i] = static_cast<int16_t>(_mm_cvtss_si32(_mm_set_ss(x[i] * inverse)));
    for (; i < kp; ++i) d[i] = 0;
  }
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

// The inner steps of linear_rows, in an order that compilers may not change: they hoist products, run out of registers and spill.
#if defined(__GNUC__)
PC_INLINE void multiply_add(__m256i& c0, __m256i& c1, const char* pair, __m256i b0, __m256i b1) {
  __m256i v, product;
  __asm__ volatile(
      "vpbroadcastd %[pair],%[v]\n"
      "vpmaddwd %[b0],%[v],%[product]\n"
      "vpmaddwd %[b1],%[v],%[v]\n"
      "vpaddd %[product],%[c0],%[c0]\n"
      "vpaddd %[v],%[c1],%[c1]\n"
      : [c0] "+x"(c0), [c1] "+x"(c1), [v] "=&x"(v), [product] "=&x"(product)
      : [pair] "m"(*reinterpret_cast<const char (*)[4]>(pair)), [b0] "x"(b0), [b1] "x"(b1));
}
#else
PC_INLINE void multiply_add(__m256i& c0, __m256i& c1, const char* pair, __m256i b0, __m256i b1) {
  const __m256i v = _mm256_set1_epi32(load32(pair));
  c0 = _mm256_add_epi32(c0, _mm256_madd_epi16(v, b0));
  c1 = _mm256_add_epi32(c1, _mm256_madd_epi16(v, b1));
}
#endif

// Panels are widened this many k at a time, so that the block (16 KB) stays in L1 for all rows; sums wait in memory between blocks.
constexpr int64_t kWideDepth = 512;
constexpr int64_t kWideRows = 120;

// Where a register tile starts and ends: with zeros or with sums that wait in `acc`, in `acc` or as floats in `out`.
struct Strip {
  int32_t* acc;
  bool first, last;
};

// tile and store_f32 in one: the sums leave as floats. b is int8, or int16 if kWide.
template <int R, bool kRelu, bool kWide>
PC_INLINE void linear_rows(const char* a, int64_t stride, int64_t depth, const void* b, const Strip& strip, int used,
                           const float* row_scale, const Epilogue& e, float* out, int64_t ldo) {
  __m256i c[R][2];
  if (strip.first) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = _mm256_setzero_si256();
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      c[r][0] = _mm256_load_si256(reinterpret_cast<const __m256i*>(strip.acc + r * kNr));
      c[r][1] = _mm256_load_si256(reinterpret_cast<const __m256i*>(strip.acc + r * kNr + 8));
    }
  }
  const char *x = a, *x3 = a + 3 * stride, *w = static_cast<const char*>(b);
  for (int64_t i = 0; i < depth / kKr; ++i, x += 4, x3 += 4) {
    __m256i b0, b1;
    if (kWide) {
      b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w));
      b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 32));
      w += 64;
    } else {
      b0 = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(w)));
      b1 = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(w + 16)));
      w += 32;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) multiply_add(c[r][0], c[r][1], (r < 3 ? x : x3) + r % 3 * stride, b0, b1);
  }
  if (!strip.last) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(strip.acc + r * kNr), c[r][0]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(strip.acc + r * kNr + 8), c[r][1]);
    }
    return;
  }
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(used - 8 * v), lane);
    const __m256 sb = _mm256_maskload_ps(e.col_scale + 8 * v, m);
    const __m256 bias = e.bias ? _mm256_maskload_ps(e.bias + 8 * v, m) : _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(row_scale[r]), sb);
      const __m256 y =
          activate_avx2(_mm256_fmadd_ps(_mm256_cvtepi32_ps(c[r][v]), scale, bias), kRelu ? Activation::relu : Activation::none);
      if (used >= 8 * v + 8)
        _mm256_storeu_ps(out + r * ldo + 8 * v, y);
      else
        _mm256_maskstore_ps(out + r * ldo + 8 * v, m, y);
    }
  }
}

template <bool kRelu, bool kWide>
void linear_strip(const char* a, int64_t stride, int64_t rows, int64_t depth, const void* b, Strip strip, int used, const Epilogue& e,
                  float* out, int64_t ldo) {
  const float* scale = e.row_scale;
  int count = 0;
  for (; rows > 0; rows -= count, a += count * stride, strip.acc += count * kNr, scale += count, out += count * ldo) {
    count = next_rows(rows);
    switch (count) {
      case 1:
        linear_rows<1, kRelu, kWide>(a, stride, depth, b, strip, used, scale, e, out, ldo);
        break;
      case 2:
        linear_rows<2, kRelu, kWide>(a, stride, depth, b, strip, used, scale, e, out, ldo);
        break;
      case 3:
        linear_rows<3, kRelu, kWide>(a, stride, depth, b, strip, used, scale, e, out, ldo);
        break;
      case 4:
        linear_rows<4, kRelu, kWide>(a, stride, depth, b, strip, used, scale, e, out, ldo);
        break;
      case 5:
        linear_rows<5, kRelu, kWide>(a, stride, depth, b, strip, used, scale, e, out, ldo);
        break;
      default:
        linear_rows<6, kRelu, kWide>(a, stride, depth, b, strip, used, scale, e, out, ldo);
    }
  }
}

template <bool kRelu>
void linear_panel(const char* a, int64_t stride, int64_t rows, int64_t depth, const int8_t* b, int used, const Epilogue& e, float* out,
                  int64_t ldo) {
  alignas(32) int32_t acc[kWideRows * kNr];
  if (rows < kWidenRows) return linear_strip<kRelu, false>(a, stride, rows, depth, b, {acc, true, true}, used, e, out, ldo);
  alignas(32) int16_t wide[kWideDepth * kNr];
  for (int64_t r = 0; r < rows; r += kWideRows) {
    Epilogue own = e;
    own.row_scale += r;
    int64_t i = 0;
    do {
      const int64_t part = depth - i < kWideDepth ? depth - i : kWideDepth;
      widen_panel(b + i * kNr, part * kNr, wide);
      linear_strip<kRelu, true>(a + r * stride + i * 2, stride, rows - r < kWideRows ? rows - r : kWideRows, part, wide,
                                {acc, i == 0, i + part >= depth}, used, own, out + r * ldo, ldo);
      i += part;
    } while (i < depth);
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

void activate(float* y, int64_t rows, int cols, int64_t ld, Activation activation) {
  for (int64_t r = 0; r < rows; ++r, y += ld)
    for (int c = 0; c < cols; c += 8) {
      const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(cols - c), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      _mm256_maskstore_ps(y + c, m, activate_avx2(_mm256_maskload_ps(y + c, m), activation));
    }
}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2",      Isa::avx2,   kMr,          kNr,      16,         kKr,           2,
                      amax,        range,       quantize_row, load_row, widen_avx2, tile,          store_f32,
                      narrow_avx2, widen_panel, tile_wide,    false,    linear,     quantize_rows, activate};

}  // namespace pycompress::int8_matmul
#endif
