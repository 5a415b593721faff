// AVX2: 8 weights become floats in two instructions and meet up to 2 rows of x; 16 registers hold no more sums.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/float_rows.h"
#include "int8_weight/int8_weight.h"

namespace pycompress::int8_weight {
namespace {

PC_TARGET_BEGIN("avx2,fma")

PC_INLINE __m128i load8(const int8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

PC_INLINE __m128i load_part(const int8_t* p, int64_t count) {  // 1 to 7 bytes, zeros behind them
  alignas(8) int8_t bytes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < count; ++i) bytes[i] = p[i];
  return load8(bytes);
}

PC_INLINE float reduce(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <int R, int C>
void tile(const float* x, int64_t ldx, const int8_t* w, int64_t k, float (*sums)[kCols]) {
  __m256 sum[R][C];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = _mm256_setzero_ps();
  // One weight vector at a time: 8 sums, 2 rows of x and what is in flight fit 16 registers.
  for (int64_t i = 0; i < k; i += 8) {
    __m256 a[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) a[r] = _mm256_load_ps(x + r * ldx + i);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const int8_t* p = w + c * k + i;
      _mm_prefetch(reinterpret_cast<const char*>(p + 512), _MM_HINT_T0);
      const __m128i q = k - i >= 8 ? load8(p) : load_part(p, k - i);
      const __m256 b = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) sum[r][c] = _mm256_fmadd_ps(a[r], b, sum[r][c]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = reduce(sum[r][c]);
}

template <int R>
PC_INLINE void tile_cols(const float* x, int64_t ldx, const int8_t* w, int64_t k, int cols, float (*sums)[kCols]) {
  switch (cols) {
    case 1:
      return tile<R, 1>(x, ldx, w, k, sums);
    case 2:
      return tile<R, 2>(x, ldx, w, k, sums);
    case 3:
      return tile<R, 3>(x, ldx, w, k, sums);
    default:
      return tile<R, 4>(x, ldx, w, k, sums);
  }
}

void dot(const float* x, int64_t ldx, int rows, const int8_t* w, int64_t k, int cols, float (*sums)[kCols]) {
  if (rows == 1)
    tile_cols<1>(x, ldx, w, k, cols, sums);
  else
    tile_cols<2>(x, ldx, w, k, cols, sums);
}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2", Isa::avx2, 2, widen_row, narrow_row, dot};

}  // namespace pycompress::int8_weight
#endif
