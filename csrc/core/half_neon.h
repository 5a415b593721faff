// bfloat16 and float16 rows on NEON vectors, with the roundings of float_rows.h. Baseline aarch64; static, a copy per file.
#pragma once
#include "core/target.h"
#if PC_ARM64
#include <arm_neon.h>

#include "core/float_rows.h"

namespace pycompress {

static inline void widen_neon(const void* src, DType dtype, int64_t n, float* dst) {
  const uint16_t* s = static_cast<const uint16_t*>(src);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const uint16x4_t h = vld1_u16(s + i);
    vst1q_f32(dst + i, dtype == DType::bf16 ? vreinterpretq_f32_u32(vshll_n_u16(h, 16)) : vcvt_f32_f16(vreinterpret_f16_u16(h)));
  }
  widen_row(s + i, dtype, n - i, dst + i);
}

static inline void narrow_neon(const float* src, int64_t n, DType dtype, void* dst) {
  uint16_t* d = static_cast<uint16_t*>(dst);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float32x4_t x = vld1q_f32(src + i);
    uint16x4_t h;
    if (dtype == DType::bf16) {
      const uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
      const uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
      h = vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), r, vdupq_n_u32(0x7fc00000u)), 16);
    } else {
      h = vreinterpret_u16_f16(vcvt_f16_f32(x));
    }
    vst1_u16(d + i, h);
  }
  narrow_row(src + i, n - i, dtype, d + i);
}

}  // namespace pycompress
#endif
