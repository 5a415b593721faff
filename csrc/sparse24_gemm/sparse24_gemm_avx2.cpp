// AVX2: rows by vpermilps (picks, per lane, one of four neighbours), columns by FMA from memory.
//
// rows: a vector holds 8 outputs; x[4g..4g+3] is broadcast to both halves, and vpermilps reads only bits 1:0 of its control, so the
// control of value i is the index word shifted by 2i. Shuffles and FMAs share a pipe: 20 dense-equivalent MAC per cycle on Zen 4.
// columns: 8 FMAs from L1 per broadcast weight, 9 loads in 4.5 cycles: 28 MAC per cycle. The dense bound is 16. On Emerald Rapids the tiles
// of 64 rows of x reach 25.5, of 48 22, of 32 23, of 16 19.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/activation_simd.h"
#include "core/float_rows.h"
#include "sparse24_gemm/sparse24_gemm.h"

namespace pycompress::sparse24_gemm {
namespace {

constexpr int kNr = 8, kMr = 8, kMc = 64;

PC_TARGET_BEGIN("avx2,fma,f16c")

PC_INLINE __m256 group(const float* x) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)); }

template <int Kept, int R>
void rows_tile(const float* a, const uint8_t* panel, int64_t blocks, float* acc) {
  constexpr int kDepth = block_depth(Kept);
  constexpr int C = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // chains per row: few rows would wait for the FMA's latency
  __m256 c[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) c[r][i] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr), a += R * kDepth) {
    prefetch_block(panel + kAhead, kNr);
    const float* v = reinterpret_cast<const float*>(panel);
    __m256i control = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 64 * kNr));
#pragma GCC unroll 2
    for (int h = 0; h < 4; ++h, v += 4 * kNr) {  // four values, out of 4 / Kept groups
      const __m256i c1 = _mm256_srli_epi32(control, 2), c2 = _mm256_srli_epi32(control, 4), c3 = _mm256_srli_epi32(control, 6);
      const __m256 v0 = _mm256_loadu_ps(v), v1 = _mm256_loadu_ps(v + kNr), v2 = _mm256_loadu_ps(v + 2 * kNr),
                   v3 = _mm256_loadu_ps(v + 3 * kNr);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float* x = a + r * kDepth + 16 / Kept * h;
        c[r][0] = _mm256_fmadd_ps(v0, _mm256_permutevar_ps(group(x), control), c[r][0]);
        c[r][1 % C] = _mm256_fmadd_ps(v1, _mm256_permutevar_ps(group(x + 1 / Kept * 4), c1), c[r][1 % C]);
        c[r][2 % C] = _mm256_fmadd_ps(v2, _mm256_permutevar_ps(group(x + 2 / Kept * 4), c2), c[r][2 % C]);
        c[r][3 % C] = _mm256_fmadd_ps(v3, _mm256_permutevar_ps(group(x + 3 / Kept * 4), c3), c[r][3 % C]);
      }
      control = _mm256_srli_epi32(control, 8);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 1; i < C; ++i) c[r][0] = _mm256_add_ps(c[r][0], c[r][i]);
    _mm256_storeu_ps(acc + r * kNr, c[r][0]);
  }
}

template <int Kept>
void rows(const float* a, int count, const uint8_t* panel, int64_t blocks, float* acc) {
  using Fn = void (*)(const float*, const uint8_t*, int64_t, float*);
  static constexpr Fn table[kMr] = {rows_tile<Kept, 1>, rows_tile<Kept, 2>, rows_tile<Kept, 3>, rows_tile<Kept, 4>,
                                    rows_tile<Kept, 5>, rows_tile<Kept, 6>, rows_tile<Kept, 7>, rows_tile<Kept, 8>};
  table[count - 1](a, panel, blocks, acc);
}

void store_rows(const float* acc, int rows, int cols, const float* bias, Activation activation, float* out, int64_t ldo) {
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(cols), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256 add = bias ? _mm256_maskload_ps(bias, mask) : _mm256_setzero_ps();
  for (int r = 0; r < rows; ++r)
    _mm256_maskstore_ps(out + r * ldo, mask, activate_avx2(_mm256_add_ps(_mm256_loadu_ps(acc + r * kNr), add), activation));
}

// V vectors of 8 rows of x, O outputs at a time.
template <int Kept, int V, int O>
PC_INLINE void columns_step(const float* xt, const uint8_t* panel, int64_t blocks, float* c, bool add) {
  constexpr int kCols = 8 * V;
  __m256 s[O][V];
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) s[o][v] = add ? _mm256_loadu_ps(c + o * kCols + 8 * v) : _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr)) {
    const float* w = reinterpret_cast<const float*>(panel);
    uint32_t index[O];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) std::memcpy(&index[o], panel + 64 * kNr + 4 * o, 4);
    // Unrolled whole: with the branches of short loops in loops it took 12 % longer on Emerald Rapids.
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g, xt += 2 / Kept * 4 * kCols, w += 2 * kNr) {  // two values, of one group or of two
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) {
          const float* row = xt + (i / Kept * 4 + (index[o] & 3)) * kCols;
          index[o] >>= 2;
          const __m256 weight = _mm256_broadcast_ss(w + i * kNr + o);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) s[o][v] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(row + 8 * v), s[o][v]);
        }
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) _mm256_storeu_ps(c + o * kCols + 8 * v, s[o][v]);
}

template <int Kept, int V, int O>
void columns_tile(const float* xt, const uint8_t* panel, int64_t blocks, int outputs, float* c, bool add) {
  int o = 0;
  for (; o + O <= outputs; o += O) columns_step<Kept, V, O>(xt, panel + 4 * o, blocks, c + o * 8 * V, add);
  for (; o < outputs; ++o) columns_step<Kept, V, 1>(xt, panel + 4 * o, blocks, c + o * 8 * V, add);
}

template <int Kept>
void columns(const float* xt, int cols, const uint8_t* panel, int64_t blocks, int outputs, float* c, bool add) {
  switch (cols) {
    case 16:
      return columns_tile<Kept, 2, 4>(xt, panel, blocks, outputs, c, add);
    case 32:
      return columns_tile<Kept, 4, 2>(xt, panel, blocks, outputs, c, add);
    case 48:
      return columns_tile<Kept, 6, 2>(xt, panel, blocks, outputs, c, add);
    default:
      return columns_tile<Kept, 8, 1>(xt, panel, blocks, outputs, c, add);
  }
}

#include "sparse24_gemm/transpose8x8.h"  // NOLINT: inside the region on purpose

void finish(float* c, int cols, int64_t outputs, const float* bias, Activation activation) {
  if (!bias && activation == Activation::none) return;
  for (int64_t o = 0; o < outputs; ++o)
    for (int m = 0; m < cols; m += 8, c += 8)
      _mm256_storeu_ps(c, activate_avx2(_mm256_add_ps(_mm256_loadu_ps(c), _mm256_set1_ps(bias ? bias[o] : 0.0f)), activation));
}

// By way of a block in memory, so that transpose8x8 serves here, too.
void turn(const float* c, int cols, int outputs, int rows, const float* bias, Activation activation, float* out, int64_t ldo) {
  alignas(32) float block[8][8];
  for (int m = 0; m < rows; m += 8)
    for (int o = 0; o < outputs; o += 8) {
      const int count = outputs - o < 8 ? outputs - o : 8;
      for (int i = 0; i < count; ++i)
        _mm256_store_ps(
            block[i],
            activate_avx2(_mm256_add_ps(_mm256_loadu_ps(c + (o + i) * cols + m), _mm256_set1_ps(bias ? bias[o + i] : 0.0f)), activation));
      if (count == 8 && m + 8 <= rows) {
        transpose8x8(block[0], 8, out + m * ldo + o, ldo);
        continue;
      }
      for (int r = m; r < rows && r < m + 8; ++r)
        for (int i = 0; i < count; ++i) out[r * ldo + o + i] = block[i][r - m];
    }
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
const Kernel kAvx2 = {"avx2",
                      Isa::avx2,
                      kNr,
                      kMr,
                      kMc,
                      widen,
                      narrow_row,
                      store_rows,
                      transpose,
                      finish,
                      turn,
                      {8, rows<2>, columns<2>},
                      {8, rows<1>, columns<1>}};

}  // namespace pycompress::sparse24_gemm
#endif
