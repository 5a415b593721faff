// AVX2: 8 lanes. 2^y by rounding y to an integer n with the magic constant 1.5 * 2^23, a polynomial of degree 5 for
// 2^(y - n), and n added to the exponent bits. 2.5 ulp at most (tests/ops/test_kd_loss_exp.py).
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/float_rows.h"
#include "kd_loss/kd_loss.h"

namespace pycompress::kd_loss {
namespace {

PC_TARGET_BEGIN("avx2,fma,f16c")

struct V {
  using R = __m256;
  static constexpr int kLanes = 8;
  static constexpr bool kBounded = true;  // beyond 2^127 the exponent bits wrap

  static PC_INLINE R load(const float* p) { return _mm256_loadu_ps(p); }
  static PC_INLINE void store(float* p, R x) { _mm256_storeu_ps(p, x); }
  static PC_INLINE R load_part(const float* p, int64_t n, float fill) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
    return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
  }
  static PC_INLINE void store_part(float* p, int64_t n, R x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  static PC_INLINE void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  static PC_INLINE R set(float x) { return _mm256_set1_ps(x); }
  static PC_INLINE R add(R a, R b) { return _mm256_add_ps(a, b); }
  static PC_INLINE R sub(R a, R b) { return _mm256_sub_ps(a, b); }
  static PC_INLINE R mul(R a, R b) { return _mm256_mul_ps(a, b); }
  static PC_INLINE R div(R a, R b) { return _mm256_div_ps(a, b); }
  static PC_INLINE R max(R a, R b) { return _mm256_max_ps(a, b); }  // b where one is NaN
  static PC_INLINE R min(R a, R b) { return _mm256_min_ps(a, b); }
  static PC_INLINE R fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }
  static PC_INLINE R fnma(R a, R b, R c) { return _mm256_fnmadd_ps(a, b, c); }
  static PC_INLINE R fms(R a, R b, R c) { return _mm256_fmsub_ps(a, b, c); }

  // Exactly 0 at and below 2^-127, where polynomial and exponent bits both are.
  template <int N>
  static PC_INLINE void exp2(R* y) {
    const R magic = set(12582912.0f);
    R k[N], p[N];
    for (int i = 0; i < N; ++i) y[i] = max(set(-127.0f), y[i]);
    for (int i = 0; i < N; ++i) k[i] = add(y[i], magic);
    for (int i = 0; i < N; ++i) y[i] = sub(y[i], sub(k[i], magic));
    for (int i = 0; i < N; ++i) p[i] = fma(set(1.326472731e-3f), y[i], set(9.671512991e-3f));
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], y[i], set(5.550733581e-2f));
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], y[i], set(2.402224243e-1f));
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], y[i], set(6.931470037e-1f));
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], y[i], set(1.0f));
    for (int i = 0; i < N; ++i) {
      const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(k[i]), 23);
      y[i] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p[i]), exponent));
    }
  }

  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  static PC_INLINE R split(R x, R* e) {
    const __m256i u = _mm256_castps_si256(x), k = _mm256_srai_epi32(_mm256_sub_epi32(u, _mm256_set1_epi32(0x3f3504f3)), 23);
    *e = _mm256_cvtepi32_ps(k);
    return _mm256_castsi256_ps(_mm256_sub_epi32(u, _mm256_slli_epi32(k, 23)));
  }
  static PC_INLINE R select_positive(R x, R v) { return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ), v); }
  static PC_INLINE R select_less(R a, R b, R v, R w) { return _mm256_blendv_ps(w, v, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static PC_INLINE float reduce_add(R x) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  static PC_INLINE float reduce_max(R x) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
  }
};

#include "kd_loss/kd_loss_sweep.h"

void widen(const void* src, DType dtype, int64_t n, float* dst) {
  const uint16_t* s = static_cast<const uint16_t*>(src);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i));
    const __m256 f = dtype == DType::bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)) : _mm256_cvtph_ps(h);
    _mm256_storeu_ps(dst + i, f);
  }
  widen_row(s + i, dtype, n - i, dst + i);
}

void narrow(const float* src, int64_t n, DType dtype, void* dst) {
  uint16_t* d = static_cast<uint16_t*>(dst);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(src + i);
    __m128i h;
    if (dtype == DType::bf16) {
      const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
      __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
      r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
      h = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    } else {
      h = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(d + i), h);
  }
  narrow_row(src + i, n - i, dtype, d + i);
}

PC_KD_TABLES

PC_TARGET_END

}  // namespace

extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2", Isa::avx2, V::kLanes, kSweeps,     sweep_one<V>, mix<V>, kCombines,
                      kTiles, max_of<V>, sum_of<V>, log2_row<V>, widen,        narrow};

}  // namespace pycompress::kd_loss
#endif
