// AVX-512: 16 weights become floats in two instructions and meet up to 4 rows of x.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/float_rows.h"
#include "int8_weight/int8_weight.h"

namespace pycompress::int8_weight {
namespace {

PC_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")

template <int R, int C>
PC_INLINE void step(const float* x, int64_t ldx, const int8_t* w, int64_t k, __mmask16 mask, __m512 (&sum)[R][C]) {
  __m512 b[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) b[c] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, w + c * k)));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512 a = _mm512_load_ps(x + r * ldx);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = _mm512_fmadd_ps(a, b[c], sum[r][c]);
  }
}

template <int R, int C>
void tile(const float* x, int64_t ldx, const int8_t* w, int64_t k, float (*sums)[kCols]) {
  __m512 sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) _mm_prefetch(reinterpret_cast<const char*>(w + i + c * k + 512), _MM_HINT_T0);
    step<R, C>(x + i, ldx, w + i, k, 0xffff, sum);
  }
  if (i < k) step<R, C>(x + i, ldx, w + i, k, static_cast<__mmask16>((1u << (k - i)) - 1), sum);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_reduce_add_ps(sum[r][c]);
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
  switch (rows) {
    case 1:
      return tile_cols<1>(x, ldx, w, k, cols, sums);
    case 2:
      return tile_cols<2>(x, ldx, w, k, cols, sums);
    case 3:
      return tile_cols<3>(x, ldx, w, k, cols, sums);
    default:
      return tile_cols<4>(x, ldx, w, k, cols, sums);
  }
}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx512;
const Kernel kAvx512 = {"avx512", Isa::avx512, 4, widen_row, narrow_row, dot};

}  // namespace pycompress::int8_weight
#endif
