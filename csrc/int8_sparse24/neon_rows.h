// What the NEON kernels of int8_sparse24 share: rows in, tiles out, and the tables of tiles. Baseline aarch64 only; everything is
// static, a copy per file.
//
// Operands are s8 in windows of 16 k. A vector holds 4 outputs x 4 kept values, one step of 8 k (2:4) or 16 k (1:4); tbl picks the
// activations that meet them.
#pragma once
#include "core/half_neon.h"
#include "core/neon_tail.h"
#include "int8_matmul/neon_rows.h"
#if PC_ARM64
#include "int8_sparse24/int8_sparse24.h"

namespace pycompress::int8_sparse24 {

inline constexpr int kNr = 8;

static inline void quantize_row_neon(const float* x, int64_t k, int64_t kp, float inverse, uint8_t* dst, int64_t stride) {
  const float32x4_t lo = vdupq_n_f32(-127.0f), hi = vdupq_n_f32(127.0f);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16, dst += stride) {
    const int8x8_t low = vmovn_s16(int8_matmul::quantize8(x + i, inverse, lo, hi)),
                   high = vmovn_s16(int8_matmul::quantize8(x + i + 8, inverse, lo, hi));
    vst1q_s8(reinterpret_cast<int8_t*>(dst), vcombine_s8(low, high));
  }
  for (; i < kp; i += 16, dst += stride) int8_matmul::quantize_row_s8(x + i, i < k ? k - i : 0, 16, inverse, 0, -127, dst);
}

// Positions inside its window of the activations that step kStep's values meet, out of the indices of 4 outputs.
template <int Kept, int kStep>
static PC_INLINE uint8x16_t control(uint8x16_t indices) {
  const uint8x16_t base = vreinterpretq_u8_u32(vdupq_n_u32(Kept == 1 ? 0x0c080400u : 0x04040000u + kStep % 2 * 0x08080808u));
  uint8x16_t shifted = indices;
  if constexpr (kStep > 0) shifted = vshrq_n_u8(indices, 2 * kStep);
  return vbslq_u8(vdupq_n_u8(3), shifted, base);
}

// Where step kStep's windows begin in a block of `mr` rows.
template <int Kept, int kStep>
constexpr int window_offset(int mr) {
  return kStep * Kept == 0 ? 0 : (Kept == 1 ? kStep : kStep / 2) * mr * 16;
}

static inline void store_f32_neon(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  for (int c = 0; c < cols; c += 4) {
    const float32x4_t sb = load_first_neon(e.col_scale + c, cols - c),
                      bias = e.bias ? load_first_neon(e.bias + c, cols - c) : vdupq_n_f32(0.0f);
    for (int r = 0; r < rows; ++r) {
      const float32x4_t sum = vcvtq_f32_s32(vld1q_s32(acc + r * kNr + c));
      store_first_neon(out + r * ldo + c, cols - c, activate_neon(vfmaq_f32(bias, sum, vmulq_n_f32(sb, e.row_scale[r])), e.activation));
    }
  }
}

}  // namespace pycompress::int8_sparse24
#endif
