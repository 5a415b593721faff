// Vectors of which only the first lanes exist in memory.
#pragma once
#include "core/target.h"
#if PC_ARM64
#include <arm_neon.h>

namespace pycompress {

// The first `count` lanes (1 to 4), zeros in the others.
static PC_INLINE float32x4_t load_first_neon(const float* p, int count) {
  if (count >= 4) return vld1q_f32(p);
  float32x4_t v = vld1q_lane_f32(p, vdupq_n_f32(0.0f), 0);
  if (count > 1) v = vld1q_lane_f32(p + 1, v, 1);
  if (count > 2) v = vld1q_lane_f32(p + 2, v, 2);
  return v;
}

static PC_INLINE void store_first_neon(float* p, int count, float32x4_t v) {
  if (count >= 4) return vst1q_f32(p, v);
  vst1q_lane_f32(p, v, 0);
  if (count > 1) vst1q_lane_f32(p + 1, v, 1);
  if (count > 2) vst1q_lane_f32(p + 2, v, 2);
}

// 1 to 8 bytes, zeros behind them.
static PC_INLINE int8x8_t load_bytes_neon(const int8_t* p, int64_t count) {
  if (count >= 8) return vld1_s8(p);
  int8_t bytes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < count; ++i) bytes[i] = p[i];
  return vld1_s8(bytes);
}

}  // namespace pycompress
#endif
