// A 4 x 4 transpose of floats in registers.
#pragma once
#include "core/target.h"
#if PC_ARM64
#include <arm_neon.h>

namespace pycompress {

static PC_INLINE void transpose4_neon(float32x4_t (&r)[4]) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1])),
                    e = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3])), g = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
  r[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, e)), r[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, g));
  r[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, e)), r[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, g));
}

}  // namespace pycompress
#endif
