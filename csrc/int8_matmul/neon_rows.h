// What the NEON kernels of int8_matmul share: rows in, tiles out. Baseline aarch64 only; everything is static, a copy per file.
#pragma once
#include "core/activation_neon.h"
#if PC_ARM64
#include "core/half_neon.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {

static inline float amax_neon(const float* x, int64_t k) {
  const uint32x4_t mask = vdupq_n_u32(0x7fffffffu);
  uint32x4_t best = vdupq_n_u32(0), best1 = best;  // as an integer, |x| orders like |x| and NaN is the largest
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    best = vmaxq_u32(best, vandq_u32(mask, vreinterpretq_u32_f32(vld1q_f32(x + i))));
    best1 = vmaxq_u32(best1, vandq_u32(mask, vreinterpretq_u32_f32(vld1q_f32(x + i + 4))));
  }
  uint32_t top = vmaxvq_u32(vmaxq_u32(best, best1));
  for (; i < k; ++i) {
    uint32_t u;
    std::memcpy(&u, x + i, 4);
    u &= 0x7fffffffu;
    top = u > top ? u : top;
  }
  float f;
  std::memcpy(&f, &top, 4);
  return f;
}

static inline void range_neon(const float* x, int64_t k, float* low, float* high) {
  float32x4_t lo = vdupq_n_f32(0.0f), hi = lo;
  int64_t i = 0;
  for (; i + 4 <= k; i += 4) {
    lo = vminq_f32(lo, vld1q_f32(x + i));
    hi = vmaxq_f32(hi, vld1q_f32(x + i));
  }
  float l = vminvq_f32(lo), h = vmaxvq_f32(hi);
  for (; i < k; ++i) {
    l = x[i] < l ? x[i] : l;
    h = x[i] > h ? x[i] : h;
  }
  *low = l, *high = h;
}

// q - zero_point of four elements; fcvtns turns NaN into 0, and then clamps like any number.
static PC_INLINE int32x4_t quantize4(float32x4_t x, float inverse, float32x4_t lo, float32x4_t hi) {
  return vcvtnq_s32_f32(vminq_f32(vmaxq_f32(vmulq_n_f32(x, inverse), lo), hi));
}

static PC_INLINE int16x8_t quantize8(const float* x, float inverse, float32x4_t lo, float32x4_t hi) {
  return vcombine_s16(vmovn_s32(quantize4(vld1q_f32(x), inverse, lo, hi)), vmovn_s32(quantize4(vld1q_f32(x + 4), inverse, lo, hi)));
}

static PC_INLINE int quantize1(float x, float inverse, float32x4_t lo, float32x4_t hi) {
  return vgetq_lane_s32(quantize4(vdupq_n_f32(x), inverse, lo, hi), 0);
}

static inline void quantize_row_s16(const float* x, int64_t k, int64_t kp, float inverse, int zero_point, int quant_min, void* dst) {
  int16_t* d = static_cast<int16_t*>(dst);
  const float32x4_t lo = vdupq_n_f32(static_cast<float>(quant_min - zero_point)), hi = vdupq_n_f32(static_cast<float>(127 - zero_point));
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) vst1q_s16(d + i, quantize8(x + i, inverse, lo, hi));
  for (; i < k; ++i) d[i] = static_cast<int16_t>(quantize1(x[i], inverse, lo, hi));
  for (; i < kp; ++i) d[i] = 0;
}

static inline void quantize_row_s8(const float* x, int64_t k, int64_t kp, float inverse, int zero_point, int quant_min, void* dst) {
  int8_t* d = static_cast<int8_t*>(dst);
  const float32x4_t lo = vdupq_n_f32(static_cast<float>(quant_min - zero_point)), hi = vdupq_n_f32(static_cast<float>(127 - zero_point));
  const int16x8_t z = vdupq_n_s16(static_cast<int16_t>(zero_point));
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) vst1_s8(d + i, vmovn_s16(vaddq_s16(quantize8(x + i, inverse, lo, hi), z)));
  for (; i < k; ++i) d[i] = static_cast<int8_t>(quantize1(x[i], inverse, lo, hi) + zero_point);
  for (; i < kp; ++i) d[i] = 0;
}

static inline void load_row_s16(const int8_t* a, int64_t k, int64_t kp, int zero_point, void* dst) {
  int16_t* d = static_cast<int16_t*>(dst);
  for (int64_t i = 0; i < k; ++i) d[i] = static_cast<int16_t>(a[i] - zero_point);
  for (int64_t i = k; i < kp; ++i) d[i] = 0;
}

static inline void load_row_s8(const int8_t* a, int64_t k, int64_t kp, int, void* dst) {
  if (k > 0) std::memcpy(dst, a, static_cast<size_t>(k));
  if (kp > k) std::memset(static_cast<int8_t*>(dst) + k, 0, static_cast<size_t>(kp - k));
}

template <Activation kActivation>
static PC_INLINE void store_rows(const int32_t* acc, int ld, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  int c = 0;
  for (; c + 4 <= cols; c += 4) {
    const float32x4_t sb = vld1q_f32(e.col_scale + c), bias = e.bias ? vld1q_f32(e.bias + c) : vdupq_n_f32(0.0f);
    const uint32x4_t sums = vreinterpretq_u32_s32(vld1q_s32(e.column_sum + c));
    for (int r = 0; r < rows; ++r) {
      const uint32x4_t all = vreinterpretq_u32_s32(vld1q_s32(acc + r * ld + c));
      const int32x4_t sum = vreinterpretq_s32_u32(vmlsq_n_u32(all, sums, static_cast<uint32_t>(e.row_correction[r])));
      const float32x4_t y = vfmaq_f32(bias, vcvtq_f32_s32(sum), vmulq_n_f32(sb, e.row_scale[r]));
      vst1q_f32(out + r * ldo + c, activate_neon(y, kActivation));
    }
  }
  for (; c < cols; ++c)
    for (int r = 0; r < rows; ++r) {
      const uint32_t extra = static_cast<uint32_t>(e.row_correction[r]) * static_cast<uint32_t>(e.column_sum[c]);
      const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(acc[r * ld + c]) - extra);
      const float y = std::fma(static_cast<float>(sum), e.row_scale[r] * e.col_scale[c], e.bias ? e.bias[c] : 0.0f);
      out[r * ldo + c] = vgetq_lane_f32(activate_neon(vdupq_n_f32(y), kActivation), 0);
    }
}

template <int kNr>
static inline void store_f32_neon(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  PC_WITH_ACTIVATION(e.activation, store_rows, acc, kNr, rows, cols, e, out, ldo)
}

}  // namespace pycompress::int8_matmul
#endif
