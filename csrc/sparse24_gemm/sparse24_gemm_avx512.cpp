// AVX-512: rows by vpermps out of a window of 16 k, columns by FMA from memory.
//
// rows: a vector holds 16 outputs; the control of value i is its 2-bit index plus the place of its group in the window. A window is a
// plain load; vpermilps would need it broadcast to four lanes, which on Zen 4 costs a shuffle. Permutation and FMA together take 1.33
// cycles there, half of that on Zen 5: 24 and 48 dense-equivalent MAC per cycle, where the dense bounds are 16 and 32.
// columns: V FMAs from L1 per broadcast weight, V + 1 loads of 64 bytes, of which Zen 4 does one a cycle and Zen 5 two. With V = 4 that is
// 26 and 51 MAC per cycle, with V = 8, for which an L1 of 48 KB is needed, 57.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/activation_simd.h"
#include "core/float_rows.h"
#include "sparse24_gemm/sparse24_gemm.h"

namespace pycompress::sparse24_gemm {
namespace {

constexpr int kNr = 16, kMr = 16, kMc = 128;

PC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

template <int Kept, int R>
void rows_tile(const float* a, const uint8_t* panel, int64_t blocks, float* acc) {
  constexpr int kDepth = block_depth(Kept);
  constexpr int C = R <= 4 ? 2 : 1;  // chains per row: few rows would wait for the FMA's latency
  __m512 c[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < C; ++i) c[r][i] = _mm512_setzero_ps();
  // Two values at a time: of one group, or of two neighbours.
  const __m512i three = _mm512_set1_epi32(3), second = _mm512_set1_epi32(Kept == 1 ? 4 : 0), next = _mm512_set1_epi32(8 / Kept);
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr), a += R * kDepth) {
    prefetch_block(panel + kAhead, kNr);
    const float* v = reinterpret_cast<const float*>(panel);
    __m512i indices = _mm512_loadu_si512(panel + 64 * kNr);
#pragma GCC unroll 2
    for (int w = 0; w < 4 / Kept; ++w) {
      __m512i base = _mm512_setzero_si512();
      for (int g = 0; g < 2 * Kept; ++g, v += 2 * kNr) {
        // (indices >> 2i) & 3 | base
        const __m512i c0 = _mm512_ternarylogic_epi32(indices, three, base, 0xea);
        const __m512i c1 = _mm512_ternarylogic_epi32(_mm512_srli_epi32(indices, 2), three, _mm512_add_epi32(base, second), 0xea);
        const __m512 v0 = _mm512_loadu_ps(v), v1 = _mm512_loadu_ps(v + kNr);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const __m512 x = _mm512_loadu_ps(a + r * kDepth + 16 * w);
          c[r][0] = _mm512_fmadd_ps(v0, _mm512_permutexvar_ps(c0, x), c[r][0]);
          c[r][C - 1] = _mm512_fmadd_ps(v1, _mm512_permutexvar_ps(c1, x), c[r][C - 1]);
        }
        indices = _mm512_srli_epi32(indices, 4);
        base = _mm512_add_epi32(base, next);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (C == 2) c[r][0] = _mm512_add_ps(c[r][0], c[r][C - 1]);
    _mm512_storeu_ps(acc + r * kNr, c[r][0]);
  }
}

template <int Kept>
void rows(const float* a, int count, const uint8_t* panel, int64_t blocks, float* acc) {
  using Fn = void (*)(const float*, const uint8_t*, int64_t, float*);
  static constexpr Fn table[kMr] = {rows_tile<Kept, 1>,  rows_tile<Kept, 2>,  rows_tile<Kept, 3>,  rows_tile<Kept, 4>,
                                    rows_tile<Kept, 5>,  rows_tile<Kept, 6>,  rows_tile<Kept, 7>,  rows_tile<Kept, 8>,
                                    rows_tile<Kept, 9>,  rows_tile<Kept, 10>, rows_tile<Kept, 11>, rows_tile<Kept, 12>,
                                    rows_tile<Kept, 13>, rows_tile<Kept, 14>, rows_tile<Kept, 15>, rows_tile<Kept, 16>};
  table[count - 1](a, panel, blocks, acc);
}

void store_rows(const float* acc, int rows, int cols, const float* bias, Activation activation, float* out, int64_t ldo) {
  const __mmask16 mask = static_cast<__mmask16>((1u << cols) - 1);
  const __m512 add = bias ? _mm512_maskz_loadu_ps(mask, bias) : _mm512_setzero_ps();
  for (int r = 0; r < rows; ++r)
    _mm512_mask_storeu_ps(out + r * ldo, mask, activate_avx512(_mm512_add_ps(_mm512_loadu_ps(acc + r * kNr), add), activation));
}

// V vectors of 16 rows of x, O outputs at a time: 8 to 16 FMAs in flight, as four cycles pass before a sum can be added to again.
template <int Kept, int V, int O>
PC_INLINE void columns_step(const float* xt, const uint8_t* panel, int64_t blocks, float* c, bool add) {
  constexpr int kCols = 16 * V;
  __m512 s[O][V];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) s[o][v] = add ? _mm512_loadu_ps(c + o * kCols + 16 * v) : _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr)) {
    const float* w = reinterpret_cast<const float*>(panel);
    uint32_t index[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) std::memcpy(&index[o], panel + 64 * kNr + 4 * o, 4);
    // Unrolled whole: with the branches of short loops in loops it took 4 % longer on Emerald Rapids.
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g, xt += 2 / Kept * 4 * kCols, w += 2 * kNr) {  // two values, of one group or of two
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) {
          const float* row = xt + (i / Kept * 4 + (index[o] & 3)) * kCols;
          index[o] >>= 2;
          const __m512 weight = _mm512_set1_ps(w[i * kNr + o]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) s[o][v] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(row + 16 * v), s[o][v]);
        }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + o * kCols + 16 * v, s[o][v]);
}

template <int Kept, int V, int O>
void columns_tile(const float* xt, const uint8_t* panel, int64_t blocks, int outputs, float* c, bool add) {
  int o = 0;
  for (; o + O <= outputs; o += O) columns_step<Kept, V, O>(xt, panel + 4 * o, blocks, c + o * 16 * V, add);
  for (; o < outputs; ++o) columns_step<Kept, V, 1>(xt, panel + 4 * o, blocks, c + o * 16 * V, add);
}

template <int Kept>
void columns(const float* xt, int cols, const uint8_t* panel, int64_t blocks, int outputs, float* c, bool add) {
  using Fn = void (*)(const float*, const uint8_t*, int64_t, int, float*, bool);
  static constexpr Fn table[kMc / 16] = {columns_tile<Kept, 1, 4>, columns_tile<Kept, 2, 4>, columns_tile<Kept, 3, 4>,
                                         columns_tile<Kept, 4, 2>, columns_tile<Kept, 5, 2>, columns_tile<Kept, 6, 2>,
                                         columns_tile<Kept, 7, 2>, columns_tile<Kept, 8, 2>};
  table[cols / 16 - 1](xt, panel, blocks, outputs, c, add);
}

// b[m][o] = a[o][m], 16 x 16 values in registers.
PC_INLINE void transpose16x16(__m512 (&a)[16], __m512 (&b)[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  // a[4g + i] holds, in its lane l of four values, b[4l + i][4g], ..., b[4l + i][4g + 3].
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x44), high = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xee);
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x44), high2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xee);
    b[i] = _mm512_shuffle_f32x4(low, low2, 0x88), b[4 + i] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    b[8 + i] = _mm512_shuffle_f32x4(high, high2, 0x88), b[12 + i] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}

PC_INLINE __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }

void transpose(const float* src, int64_t lds, int rows, int64_t count, float* dst, int64_t ldd, int padded) {
  for (int r = 0; r < padded; r += 16)
    for (int64_t k = 0; k < count; k += 16) {
      const __mmask16 mask = first(count - k), kept = first(padded - r);
      __m512 a[16], b[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) a[i] = r + i < rows ? _mm512_maskz_loadu_ps(mask, src + (r + i) * lds + k) : _mm512_setzero_ps();
      transpose16x16(a, b);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (k + i < count) _mm512_mask_storeu_ps(dst + (k + i) * ldd + r, kept, b[i]);
    }
}

void turn(const float* c, int cols, int outputs, int rows, const float* bias, Activation activation, float* out, int64_t ldo) {
  for (int m = 0; m < rows; m += 16)
    for (int o = 0; o < outputs; o += 16) {
      const __mmask16 mask = first(outputs - o);
      __m512 a[16], b[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        a[i] = _mm512_setzero_ps();
        if (o + i < outputs) a[i] = _mm512_add_ps(_mm512_loadu_ps(c + (o + i) * cols + m), _mm512_set1_ps(bias ? bias[o + i] : 0.0f));
      }
      transpose16x16(a, b);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (m + i < rows) _mm512_mask_storeu_ps(out + (m + i) * ldo + o, mask, activate_avx512(b[i], activation));
    }
}

void finish(float* c, int cols, int64_t outputs, const float* bias, Activation activation) {
  if (!bias && activation == Activation::none) return;
  for (int64_t o = 0; o < outputs; ++o)
    for (int m = 0; m < cols; m += 16, c += 16)
      _mm512_storeu_ps(c, activate_avx512(_mm512_add_ps(_mm512_loadu_ps(c), _mm512_set1_ps(bias ? bias[o] : 0.0f)), activation));
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

extern const Kernel kAvx512;
const Kernel kAvx512 = {"avx512",
                        Isa::avx512,
                        kNr,
                        kMr,
                        kMc,
                        widen,
                        narrow_row,
                        store_rows,
                        transpose,
                        finish,
                        turn,
                        {40, rows<2>, columns<2>},
                        {40, rows<1>, columns<1>}};

}  // namespace pycompress::sparse24_gemm
#endif
