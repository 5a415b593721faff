// AVX-512 VNNI: activations as u8 (q + 128), weights s8, vpdpbusd into int32, which wraps and never saturates.
// The offset of 128 leaves 128 * column_sum behind; the epilogue takes it away together with the zero point.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include <cstring>

#include "core/activation_simd.h"
#include "core/cpu_features.h"
#include "core/half_simd.h"
#include "int8_matmul/int8_matmul.h"

#if defined(__GNUC__)
#define PC_LAMBDA_INLINE __attribute__((always_inline))
#else
#define PC_LAMBDA_INLINE
#endif

namespace pycompress::int8_matmul {
namespace {

// 6 x 64: 24 accumulators, 4 vectors of b, 1 broadcast of a: 29 of 32 registers.
constexpr int kMr = 6, kNr = 64, kKr = 4;

// From two tiles of rows on the next panel is fetched while this one is in use: with one, reading this one is all there is to do. With 7 or
// 8 rows that takes longer on Zen 5 if the weights are in L3 (8 x 2048 x 2048: 83 instead of 71 us, from memory 159 instead of 165).
int64_t ahead_rows() {
  static const bool amd = std::strcmp(cpu_vendor(), "AuthenticAMD") == 0;
  return amd ? 9 : kMr + 1;
}

PC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

PC_INLINE __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

float amax(const float* x, int64_t k) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i best = _mm512_setzero_si512(), best1 = best;
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    best = _mm512_max_epu32(best, _mm512_and_si512(mask, _mm512_loadu_si512(x + i)));
    best1 = _mm512_max_epu32(best1, _mm512_and_si512(mask, _mm512_loadu_si512(x + i + 16)));
  }
  for (; i < k; i += 16) best = _mm512_max_epu32(best, _mm512_and_si512(mask, _mm512_maskz_loadu_epi32(first(k - i), x + i)));
  const uint32_t top = _mm512_reduce_max_epu32(_mm512_max_epu32(best, best1));
  float f;
  std::memcpy(&f, &top, 4);
  return f;
}

void range(const float* x, int64_t k, float* low, float* high) {
  __m512 lo[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, hi[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 32 <= k; i += 32)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m512 y = _mm512_loadu_ps(x + i + 16 * v);
      lo[v] = _mm512_min_ps(lo[v], y);
      hi[v] = _mm512_max_ps(hi[v], y);
    }
  for (; i < k; i += 16) {
    const __m512 y = _mm512_maskz_loadu_ps(first(k - i), x + i);
    lo[0] = _mm512_min_ps(lo[0], y);
    hi[0] = _mm512_max_ps(hi[0], y);
  }
  *low = _mm512_reduce_min_ps(_mm512_min_ps(lo[0], lo[1])), *high = _mm512_reduce_max_ps(_mm512_max_ps(hi[0], hi[1]));
}

// Packing works in 128-bit lanes: dword 4 i + j of the packed vector belongs at 4 j + i.
PC_INLINE __m512i in_order(__m512i packed) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
}

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, int zero_point, int quant_min, void* dst) {
  uint8_t* d = static_cast<uint8_t*>(dst);
  const __m512 inv = _mm512_set1_ps(inverse), lo = _mm512_set1_ps(static_cast<float>(quant_min - zero_point)),
               hi = _mm512_set1_ps(static_cast<float>(127 - zero_point));
  const __m512i offset = _mm512_set1_epi32(128 + zero_point), offset16 = _mm512_set1_epi16(static_cast<int16_t>(128 + zero_point));
  const auto quantize = [&](__m512 y) PC_LAMBDA_INLINE {  // NaN ends as lo
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(y, inv), lo), hi));
  };
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {  // 0 to 255 after the offset: packing saturates nothing
    const __m512i low = _mm512_packs_epi32(quantize(_mm512_loadu_ps(x + i)), quantize(_mm512_loadu_ps(x + i + 16)));
    const __m512i high = _mm512_packs_epi32(quantize(_mm512_loadu_ps(x + i + 32)), quantize(_mm512_loadu_ps(x + i + 48)));
    _mm512_storeu_si512(d + i, in_order(_mm512_packus_epi16(_mm512_add_epi16(low, offset16), _mm512_add_epi16(high, offset16))));
  }
  for (; i < kp; i += 16) {
    const __m512i q = _mm512_add_epi32(quantize(_mm512_maskz_loadu_ps(first(k - i > 0 ? k - i : 0), x + i)), offset);
    _mm_mask_storeu_epi8(d + i, first(kp - i), _mm512_cvtepi32_epi8(q));
  }
}

// Dynamic and symmetric, where nothing needs clamping: |x| * inverse rounds to 127 at most. In a row with NaN or Inf the integers are
// any, as its scale is NaN.
PC_INLINE __m512i quantize16(const float* x, __m512 inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), inverse)); }

void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, void* dst, int64_t stride, float* scales) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  uint8_t* d = static_cast<uint8_t*>(dst);
  for (int64_t r = 0; r < rows; ++r, x += ldx, d += stride) {
    float inverse;
    scales[r] = symmetric_scale(amax(x, k), &inverse);
    const __m512 inv = _mm512_set1_ps(inverse);
    int64_t i = 0;
    for (; i + 64 <= k; i += 64) {
      const __m512i low = _mm512_packs_epi32(quantize16(x + i, inv), quantize16(x + i + 16, inv));
      const __m512i high = _mm512_packs_epi32(quantize16(x + i + 32, inv), quantize16(x + i + 48, inv));
      _mm512_storeu_si512(d + i, _mm512_xor_si512(in_order(_mm512_packs_epi16(low, high)), offset));
    }
    for (; i < kp; i += 16) {
      const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(first(k - i > 0 ? k - i : 0), x + i), inv);
      _mm_mask_storeu_epi8(d + i, first(kp - i),
                           _mm_xor_si128(_mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(y)), _mm_set1_epi8(static_cast<char>(0x80))));
    }
  }
}

void load_row(const int8_t* a, int64_t k, int64_t kp, int, void* dst) {
  uint8_t* d = static_cast<uint8_t*>(dst);
  for (int64_t i = 0; i < k; ++i) d[i] = static_cast<uint8_t>(a[i] ^ 0x80);
  for (int64_t i = k; i < kp; ++i) d[i] = 0;
}

template <int R, int V>
void tile_rows(const void* const* a, int segments, int64_t depth, const int8_t* b, int32_t* acc) {
  __m512i c[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[r][v] = _mm512_setzero_si512();
  for (int s = 0; s < segments; ++s, a += R) {
    const char* x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = static_cast<const char*>(a[r]);
    for (int64_t i = 0; i < depth / kKr; ++i, b += 64 * V) {
      __m512i w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = _mm512_load_si512(b + 64 * v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i u = _mm512_set1_epi32(load32(x[r] + 4 * i));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) c[r][v] = _mm512_dpbusd_epi32(c[r][v], u, w[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_store_si512(acc + r * kNr + 16 * v, c[r][v]);
}

template <int V>
void tile_cols(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, int32_t* acc) {
  switch (rows) {
    case 1:
      return tile_rows<1, V>(a, segments, depth, b, acc);
    case 2:
      return tile_rows<2, V>(a, segments, depth, b, acc);
    case 3:
      return tile_rows<3, V>(a, segments, depth, b, acc);
    case 4:
      return tile_rows<4, V>(a, segments, depth, b, acc);
    case 5:
      return tile_rows<5, V>(a, segments, depth, b, acc);
    default:
      return tile_rows<6, V>(a, segments, depth, b, acc);
  }
}

void tile(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, int cols, int32_t* acc) {
  switch (cols / 16) {
    case 1:
      return tile_cols<1>(a, rows, segments, depth, b, acc);
    case 2:
      return tile_cols<2>(a, rows, segments, depth, b, acc);
    case 3:
      return tile_cols<3>(a, rows, segments, depth, b, acc);
    default:
      return tile_cols<4>(a, rows, segments, depth, b, acc);
  }
}

#include "int8_matmul/zmm_dot.h"  // NOLINT: inside the region on purpose

// tile and store_f32 in one: the sums leave as floats without passing memory. Each step fetches two lines at `next` into L2.
template <int R, int V, bool kRelu>
PC_INLINE void linear_rows(const char* a, const int8_t* next, int64_t step, int64_t stride, int64_t depth, const int8_t* b, int used,
                           const float* row_scale, const int32_t* correction, const Epilogue& e, float* out, int64_t ldo) {
  __m512i c[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[r][v] = _mm512_setzero_si512();
  const char *x = a, *x3 = a + 3 * stride;
  for (int64_t i = 0; i < depth / kKr; ++i, b += 64 * V, next += step, x += kKr, x3 += kKr) {
    _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(next) + 64, _MM_HINT_T1);
    __m512i w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = _mm512_load_si512(b + 64 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i u = broadcast((r < 3 ? x : x3) + r % 3 * stride);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) dot(c[r][v], u, w[v]);
    }
  }
  bool same = true;  // symmetric, or neighbours that share their zero point
#pragma GCC unroll 8
  for (int r = 1; r < R; ++r) same &= correction[r] == correction[0];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const __mmask16 m = v + 1 < V ? __mmask16(0xffff) : first(used - 16 * v);
    const __m512 sb = _mm512_maskz_loadu_ps(m, e.col_scale + 16 * v);
    const __m512 bias = e.bias ? _mm512_maskz_loadu_ps(m, e.bias + 16 * v) : _mm512_setzero_ps();
    const __m512i sums = _mm512_maskz_loadu_epi32(m, e.column_sum + 16 * v);
    __m512i extra = _mm512_mullo_epi32(sums, _mm512_set1_epi32(correction[0]));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (r > 0 && !same) extra = _mm512_mullo_epi32(sums, _mm512_set1_epi32(correction[r]));
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(c[r][v], extra));
      const __m512 y = activate_avx512(_mm512_fmadd_ps(sum, _mm512_mul_ps(_mm512_set1_ps(row_scale[r]), sb), bias),
                                       kRelu ? Activation::relu : Activation::none);
      if (v + 1 < V)
        _mm512_storeu_ps(out + r * ldo + 16 * v, y);
      else
        _mm512_mask_storeu_ps(out + r * ldo + 16 * v, m, y);
    }
  }
}

template <int V, bool kRelu>
PC_INLINE void linear_tile(int rows, const char* a, const int8_t* next, int64_t step, int64_t stride, int64_t depth, const int8_t* b,
                           int used, const float* scale, const int32_t* correction, const Epilogue& e, float* out, int64_t ldo) {
  switch (rows) {
    case 1:
      return linear_rows<1, V, kRelu>(a, next, step, stride, depth, b, used, scale, correction, e, out, ldo);
    case 2:
      return linear_rows<2, V, kRelu>(a, next, step, stride, depth, b, used, scale, correction, e, out, ldo);
    case 3:
      return linear_rows<3, V, kRelu>(a, next, step, stride, depth, b, used, scale, correction, e, out, ldo);
    case 4:
      return linear_rows<4, V, kRelu>(a, next, step, stride, depth, b, used, scale, correction, e, out, ldo);
    case 5:
      return linear_rows<5, V, kRelu>(a, next, step, stride, depth, b, used, scale, correction, e, out, ldo);
    default:
      return linear_rows<6, V, kRelu>(a, next, step, stride, depth, b, used, scale, correction, e, out, ldo);
  }
}

template <int V, bool kRelu>
void linear_cols(const char* a, int64_t stride, int64_t rows, int64_t depth, const int8_t* b, int used, const Epilogue& e, float* out,
                 int64_t ldo) {
  int count = 0, tile = 0;
  // The first tiles share the next panel: with two of them each fetches half, two lines per step, otherwise a line per step (and the
  // line behind it, which the step after it fetches in any case).
  const int lines = rows <= 2 * kMr ? 2 : 1;
  const int64_t from = ahead_rows();
  for (int64_t r = 0; r < rows; r += count, ++tile) {
    count = next_rows(rows - r);
    const bool ahead = rows >= from && tile * lines < V;
    const int8_t* next = ahead ? b + (V + tile * lines) * 64 * (depth / kKr) : b;
    linear_tile<V, kRelu>(count, a + r * stride, next, ahead ? 64 * lines : 0, stride, depth, b, used, e.row_scale + r,
                          e.row_correction + r, e, out + r * ldo, ldo);
  }
}

template <bool kRelu>
PC_INLINE void linear_panel(const char* a, int64_t stride, int64_t rows, int64_t depth, const int8_t* b, int used, const Epilogue& e,
                            float* out, int64_t ldo) {
  switch ((used + 15) / 16) {
    case 1:
      return linear_cols<1, kRelu>(a, stride, rows, depth, b, used, e, out, ldo);
    case 2:
      return linear_cols<2, kRelu>(a, stride, rows, depth, b, used, e, out, ldo);
    case 3:
      return linear_cols<3, kRelu>(a, stride, rows, depth, b, used, e, out, ldo);
    default:
      return linear_cols<4, kRelu>(a, stride, rows, depth, b, used, e, out, ldo);
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
  for (int c = 0; c < cols; c += 16) {
    const __mmask16 m = first(cols - c);
    const __m512 sb = _mm512_maskz_loadu_ps(m, e.col_scale + c);
    const __m512 bias = e.bias ? _mm512_maskz_loadu_ps(m, e.bias + c) : _mm512_setzero_ps();
    const __m512i sums = _mm512_maskz_loadu_epi32(m, e.column_sum + c);
    __m512i extra = _mm512_setzero_si512();
    for (int r = 0; r < rows; ++r) {
      // Neighbouring rows nearly always share their zero point, and vpmulld is slow.
      if (r == 0 || e.row_correction[r] != e.row_correction[r - 1])
        extra = _mm512_mullo_epi32(sums, _mm512_set1_epi32(e.row_correction[r]));
      const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(acc + r * kNr + c), extra);
      const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(_mm512_set1_ps(e.row_scale[r]), sb), bias);
      if (m == 0xffff)
        _mm512_storeu_ps(out + r * ldo + c, activate_avx512(y, kActivation));
      else
        _mm512_mask_storeu_ps(out + r * ldo + c, m, activate_avx512(y, kActivation));
    }
  }
}

void store_f32(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  PC_WITH_ACTIVATION(e.activation, store_rows, acc, rows, cols, e, out, ldo)
}

void activate(float* y, int64_t rows, int cols, int64_t ld, Activation activation) {
  for (int64_t r = 0; r < rows; ++r, y += ld)
    for (int c = 0; c < cols; c += 16) {
      const __mmask16 m = first(cols - c);
      _mm512_mask_storeu_ps(y + c, m, activate_avx512(_mm512_maskz_loadu_ps(m, y + c), activation));
    }
}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx512Vnni;
const Kernel kAvx512Vnni = {"avx512_vnni", Isa::avx512_vnni, kMr,          kNr,  16,        kKr,           1,       amax,    range,
                            quantize_row,  load_row,         widen_avx512, tile, store_f32, narrow_avx512, nullptr, nullptr, false,
                            linear,        quantize_rows,    activate};

}  // namespace pycompress::int8_matmul
#endif
