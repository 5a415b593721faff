// NEON: 4 lanes. exp2 and log2 as in kd_loss_avx2.cpp, step by step. Baseline aarch64.
// Run under qemu only so far: see docs/kernels.md.
#include "core/half_neon.h"
#if PC_ARM64
#include "core/neon_tail.h"
#include "kd_loss/kd_loss.h"

namespace pycompress::kd_loss {
namespace {

struct V {
  using R = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr bool kBounded = true;  // beyond 2^127 the exponent bits wrap

  static PC_INLINE R load(const float* p) { return vld1q_f32(p); }
  static PC_INLINE void store(float* p, R x) { vst1q_f32(p, x); }
  static PC_INLINE R load_part(const float* p, int64_t n, float fill) {
    R v = vld1q_lane_f32(p, set(fill), 0);
    if (n > 1) v = vld1q_lane_f32(p + 1, v, 1);
    if (n > 2) v = vld1q_lane_f32(p + 2, v, 2);
    return v;
  }
  static PC_INLINE void store_part(float* p, int64_t n, R x) { store_first_neon(p, static_cast<int>(n), x); }
  static PC_INLINE void prefetch(const float* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    (void)p;
#endif
  }
  static PC_INLINE R set(float x) { return vdupq_n_f32(x); }
  static PC_INLINE R add(R a, R b) { return vaddq_f32(a, b); }
  static PC_INLINE R sub(R a, R b) { return vsubq_f32(a, b); }
  static PC_INLINE R mul(R a, R b) { return vmulq_f32(a, b); }
  static PC_INLINE R div(R a, R b) { return vdivq_f32(a, b); }
  static PC_INLINE R max(R a, R b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b where one is NaN
  static PC_INLINE R min(R a, R b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static PC_INLINE R fma(R a, R b, R c) { return vfmaq_f32(c, a, b); }
  static PC_INLINE R fnma(R a, R b, R c) { return vfmsq_f32(c, a, b); }
  static PC_INLINE R fms(R a, R b, R c) { return vfmaq_f32(vnegq_f32(c), a, b); }

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
      const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(k[i]), 23);
      y[i] = vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p[i]), exponent));
    }
  }

  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  static PC_INLINE R split(R x, R* e) {
    const int32x4_t u = vreinterpretq_s32_f32(x), k = vshrq_n_s32(vsubq_s32(u, vdupq_n_s32(0x3f3504f3)), 23);
    *e = vcvtq_f32_s32(k);
    return vreinterpretq_f32_s32(vsubq_s32(u, vshlq_n_s32(k, 23)));
  }
  static PC_INLINE R select_positive(R x, R v) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcleq_f32(x, set(0.0f))));
  }
  static PC_INLINE R select_less(R a, R b, R v, R w) { return vbslq_f32(vcltq_f32(a, b), v, w); }
  static PC_INLINE float reduce_add(R x) { return vaddvq_f32(x); }
  static PC_INLINE float reduce_max(R x) { return vmaxnmvq_f32(x); }
};

#include "kd_loss/kd_loss_sweep.h"

PC_KD_TABLES

}  // namespace

extern const Kernel kNeon;
const Kernel kNeon = {"neon", Isa::neon, V::kLanes, kSweeps,     sweep_one<V>, mix<V>,     kCombines,
                      kTiles, max_of<V>, sum_of<V>, log2_row<V>, widen_neon,   narrow_neon};

}  // namespace pycompress::kd_loss
#endif
