// Activations on vectors: relu, exact gelu (erf) and silu, with exp and erf to about float accuracy.
//
// exp: 2^n * P(r), r in [-ln2/2, ln2/2], degree 6 Taylor; relative error below 2e-7 on [-87, 88], clamped outside.
// erf: Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7, the formula torch's vectorised CPU gelu rests on too; with AVX2, where
// exp costs more, x * P(x * x) / Q(x * x) of degrees 5 and 5, fitted on [-3.92, 3.92], error below 1.6e-8 before rounding; at the border,
// 3.9201, it is 1 exactly, and stays so.
// Always inlined into functions of the same target, so no copy of them is left for the linker to pick.
#pragma once
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/types.h"

namespace pycompress {

PC_TARGET_BEGIN("avx2,fma")

static PC_INLINE __m256 exp_avx2(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x));
  __m256 p = _mm256_set1_ps(1.0f / 720);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}

static PC_INLINE __m256 erf_avx2(__m256 x) {
  x = _mm256_min_ps(_mm256_set1_ps(3.9201f), _mm256_max_ps(_mm256_set1_ps(-3.9201f), x));
  const __m256 s = _mm256_mul_ps(x, x);
  __m256 p = _mm256_set1_ps(2.034734389e-6f), q = _mm256_set1_ps(3.807061971e-5f);
  p = _mm256_fmadd_ps(p, s, _mm256_set1_ps(2.874791274e-4f)), q = _mm256_fmadd_ps(q, s, _mm256_set1_ps(1.188113589e-3f));
  p = _mm256_fmadd_ps(p, s, _mm256_set1_ps(3.868322618e-3f)), q = _mm256_fmadd_ps(q, s, _mm256_set1_ps(1.517228828e-2f));
  p = _mm256_fmadd_ps(p, s, _mm256_set1_ps(5.306047051e-2f)), q = _mm256_fmadd_ps(q, s, _mm256_set1_ps(1.150845821e-1f));
  p = _mm256_fmadd_ps(p, s, _mm256_set1_ps(1.927639667e-1f)), q = _mm256_fmadd_ps(q, s, _mm256_set1_ps(5.041642844e-1f));
  p = _mm256_fmadd_ps(p, s, _mm256_set1_ps(1.128379022f)), q = _mm256_fmadd_ps(q, s, _mm256_set1_ps(1.0f));
  return _mm256_div_ps(_mm256_mul_ps(x, p), q);
}

// NaN in, NaN out: every path ends in a product with y or a max that keeps it.
static PC_INLINE __m256 activate_avx2(__m256 y, Activation activation) {
  const __m256 one = _mm256_set1_ps(1.0f);
  switch (activation) {
    case Activation::relu:
      return _mm256_max_ps(_mm256_setzero_ps(), y);
    case Activation::gelu:
      return _mm256_mul_ps(_mm256_mul_ps(y, _mm256_set1_ps(0.5f)),
                           _mm256_add_ps(one, erf_avx2(_mm256_mul_ps(y, _mm256_set1_ps(0.70710678f)))));
    case Activation::silu:
      return _mm256_div_ps(y, _mm256_add_ps(one, exp_avx2(_mm256_sub_ps(_mm256_setzero_ps(), y))));
    case Activation::relu6:
      return _mm256_min_ps(_mm256_set1_ps(6.0f), _mm256_max_ps(_mm256_setzero_ps(), y));
    case Activation::hardswish:
      return _mm256_mul_ps(
          _mm256_mul_ps(y, _mm256_min_ps(_mm256_set1_ps(6.0f), _mm256_max_ps(_mm256_setzero_ps(), _mm256_add_ps(y, _mm256_set1_ps(3.0f))))),
          _mm256_set1_ps(1.0f / 6.0f));
    default:
      return y;
  }
}

PC_TARGET_END
PC_TARGET_BEGIN("avx2,fma,avx512f,avx512dq")

static PC_INLINE __m512 exp_avx512(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

static PC_INLINE __m512 erf_avx512(__m512 x) {
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f)), a = _mm512_xor_ps(x, sign);
  const __m512 t = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  p = _mm512_mul_ps(p, t);
  const __m512 e = exp_avx512(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(a, a)));
  return _mm512_xor_ps(_mm512_fnmadd_ps(p, e, _mm512_set1_ps(1.0f)), sign);
}

static PC_INLINE __m512 activate_avx512(__m512 y, Activation activation) {
  const __m512 one = _mm512_set1_ps(1.0f);
  switch (activation) {
    case Activation::relu:
      return _mm512_max_ps(_mm512_setzero_ps(), y);
    case Activation::gelu:
      return _mm512_mul_ps(_mm512_mul_ps(y, _mm512_set1_ps(0.5f)),
                           _mm512_add_ps(one, erf_avx512(_mm512_mul_ps(y, _mm512_set1_ps(0.70710678f)))));
    case Activation::silu:
      return _mm512_div_ps(y, _mm512_add_ps(one, exp_avx512(_mm512_sub_ps(_mm512_setzero_ps(), y))));
    case Activation::relu6:
      return _mm512_min_ps(_mm512_set1_ps(6.0f), _mm512_max_ps(_mm512_setzero_ps(), y));
    case Activation::hardswish:
      return _mm512_mul_ps(
          _mm512_mul_ps(y, _mm512_min_ps(_mm512_set1_ps(6.0f), _mm512_max_ps(_mm512_setzero_ps(), _mm512_add_ps(y, _mm512_set1_ps(3.0f))))),
          _mm512_set1_ps(1.0f / 6.0f));
    default:
      return y;
  }
}

PC_TARGET_END

}  // namespace pycompress
#endif
