// Activations on NEON vectors: the polynomials of activation_simd.h, step by step.
#pragma once
#include "core/target.h"
#if PC_ARM64
#include <arm_neon.h>

#include "core/types.h"

namespace pycompress {

static PC_INLINE float32x4_t exp_neon(float32x4_t x) {
  x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(-87.0f)), vdupq_n_f32(88.0f));
  const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
  const float32x4_t r = vfmsq_f32(vfmsq_f32(x, n, vdupq_n_f32(0.693359375f)), n, vdupq_n_f32(-2.12194440e-4f));
  float32x4_t p = vdupq_n_f32(1.0f / 720);
  p = vfmaq_f32(vdupq_n_f32(1.0f / 120), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f / 24), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f / 6), p, r);
  p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
  return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23)));
}

static PC_INLINE float32x4_t erf_neon(float32x4_t x) {
  const float32x4_t one = vdupq_n_f32(1.0f), a = vabsq_f32(x);
  const float32x4_t t = vdivq_f32(one, vfmaq_f32(one, a, vdupq_n_f32(0.3275911f)));
  float32x4_t p = vdupq_n_f32(1.061405429f);
  p = vfmaq_f32(vdupq_n_f32(-1.453152027f), p, t);
  p = vfmaq_f32(vdupq_n_f32(1.421413741f), p, t);
  p = vfmaq_f32(vdupq_n_f32(-0.284496736f), p, t);
  p = vfmaq_f32(vdupq_n_f32(0.254829592f), p, t);
  p = vmulq_f32(p, t);
  const float32x4_t y = vfmsq_f32(one, p, exp_neon(vnegq_f32(vmulq_f32(a, a))));
  return vbslq_f32(vdupq_n_u32(0x80000000u), x, y);  // the sign of x
}

// NaN in, NaN out.
static PC_INLINE float32x4_t activate_neon(float32x4_t y, Activation activation) {
  const float32x4_t one = vdupq_n_f32(1.0f), zero = vdupq_n_f32(0.0f);
  switch (activation) {
    case Activation::relu:
      return vbslq_f32(vcltq_f32(y, zero), zero, y);
    case Activation::gelu:
      return vmulq_f32(vmulq_n_f32(y, 0.5f), vaddq_f32(one, erf_neon(vmulq_n_f32(y, 0.70710678f))));
    case Activation::silu:
      return vdivq_f32(y, vaddq_f32(one, exp_neon(vnegq_f32(y))));
    case Activation::relu6:  // the instructions keep NaN
      return vminq_f32(vdupq_n_f32(6.0f), vmaxq_f32(zero, y));
    case Activation::hardswish:
      return vmulq_n_f32(vmulq_f32(y, vminq_f32(vdupq_n_f32(6.0f), vmaxq_f32(zero, vaddq_f32(y, vdupq_n_f32(3.0f))))), 1.0f / 6.0f);
    default:
      return y;
  }
}

}  // namespace pycompress
#endif
