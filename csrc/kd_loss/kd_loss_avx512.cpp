// AVX-512: 16 lanes. 2^y as a polynomial of degree 5 for the fraction in [0, 1) and vscalefps, which goes to 0 and to
// infinity by itself. 3 ulp at most (tests/ops/test_kd_loss_exp.py).
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/float_rows.h"
#include "kd_loss/kd_loss.h"

namespace pycompress::kd_loss {
namespace {

PC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

struct V {
  using R = __m512;
  static constexpr int kLanes = 16;
  static constexpr bool kBounded = false;

  static PC_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static PC_INLINE R load(const float* p) { return _mm512_loadu_ps(p); }
  static PC_INLINE void store(float* p, R x) { _mm512_storeu_ps(p, x); }
  static PC_INLINE R load_part(const float* p, int64_t n, float fill) { return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p); }
  static PC_INLINE void store_part(float* p, int64_t n, R x) { _mm512_mask_storeu_ps(p, first(n), x); }
  static PC_INLINE void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  static PC_INLINE R set(float x) { return _mm512_set1_ps(x); }
  static PC_INLINE R add(R a, R b) { return _mm512_add_ps(a, b); }
  static PC_INLINE R sub(R a, R b) { return _mm512_sub_ps(a, b); }
  static PC_INLINE R mul(R a, R b) { return _mm512_mul_ps(a, b); }
  static PC_INLINE R div(R a, R b) { return _mm512_div_ps(a, b); }
  static PC_INLINE R max(R a, R b) { return _mm512_max_ps(a, b); }  // b where one is NaN
  static PC_INLINE R min(R a, R b) { return _mm512_min_ps(a, b); }
  static PC_INLINE R fma(R a, R b, R c) { return _mm512_fmadd_ps(a, b, c); }
  static PC_INLINE R fnma(R a, R b, R c) { return _mm512_fnmadd_ps(a, b, c); }
  static PC_INLINE R fms(R a, R b, R c) { return _mm512_fmsub_ps(a, b, c); }

  template <int N>
  static PC_INLINE void exp2(R* y) {
    R r[N], p[N];
    for (int i = 0; i < N; ++i) r[i] = _mm512_reduce_ps(y[i], _MM_FROUND_TO_NEG_INF);  // y - floor(y), 0 for infinities
    for (int i = 0; i < N; ++i) p[i] = fma(set(1.867130282e-3f), r[i], set(9.017029777e-3f));
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], set(5.579991266e-2f));
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], set(2.401644439e-1f));
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], set(6.931512952e-1f));
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], set(1.0f));
    for (int i = 0; i < N; ++i) y[i] = _mm512_scalef_ps(p[i], y[i]);
  }

  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  static PC_INLINE R split(R x, R* e) {
    const __m512i u = _mm512_castps_si512(x), k = _mm512_srai_epi32(_mm512_sub_epi32(u, _mm512_set1_epi32(0x3f3504f3)), 23);
    *e = _mm512_cvtepi32_ps(k);
    return _mm512_castsi512_ps(_mm512_sub_epi32(u, _mm512_slli_epi32(k, 23)));
  }
  static PC_INLINE R select_positive(R x, R v) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), v); }
  static PC_INLINE R select_less(R a, R b, R v, R w) { return _mm512_mask_mov_ps(w, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), v); }
  static PC_INLINE float reduce_add(R x) { return _mm512_reduce_add_ps(x); }
  static PC_INLINE float reduce_max(R x) { return _mm512_reduce_max_ps(x); }
};

#include "kd_loss/kd_loss_sweep.h"

void widen(const void* src, DType dtype, int64_t n, float* dst) {
  const uint16_t* s = static_cast<const uint16_t*>(src);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = n - i >= 16 ? __mmask16(0xffff) : V::first(n - i);
    const __m256i h = _mm256_maskz_loadu_epi16(m, s + i);
    const __m512 f = dtype == DType::bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)) : _mm512_cvtph_ps(h);
    _mm512_mask_storeu_ps(dst + i, m, f);
  }
}

void narrow(const float* src, int64_t n, DType dtype, void* dst) {
  uint16_t* d = static_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = n - i >= 16 ? __mmask16(0xffff) : V::first(n - i);
    const __m512 x = _mm512_maskz_loadu_ps(m, src + i);
    __m256i h;
    if (dtype == DType::bf16) {
      const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
      __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
      r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
      h = _mm512_cvtepi32_epi16(r);
    } else {
      h = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    _mm256_mask_storeu_epi16(d + i, m, h);
  }
}

PC_KD_TABLES

PC_TARGET_END

}  // namespace

extern const Kernel kAvx512;
const Kernel kAvx512 = {"avx512", Isa::avx512, V::kLanes, kSweeps,     sweep_one<V>, mix<V>, kCombines,
                        kTiles,   max_of<V>,   sum_of<V>, log2_row<V>, widen,        narrow};

}  // namespace pycompress::kd_loss
#endif
