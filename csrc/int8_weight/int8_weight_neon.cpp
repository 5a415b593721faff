// NEON: 8 weights become two vectors of floats and meet up to 4 rows of x. Baseline aarch64.
// Run under qemu only so far: see docs/kernels.md.
#include "core/neon_tail.h"
#if PC_ARM64
#include "core/half_neon.h"
#include "int8_weight/int8_weight.h"

namespace pycompress::int8_weight {
namespace {

// 4 x 4: 16 sums, 8 vectors of x, 2 of weights: 26 of 32 registers.
template <int R, int C>
void tile(const float* x, int64_t ldx, const int8_t* w, int64_t k, float (*sums)[kCols]) {
  float32x4_t sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = vdupq_n_f32(0.0f);
  const auto step = [&](int64_t i, auto load) {
    float32x4_t a[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) a[r][0] = vld1q_f32(x + r * ldx + i), a[r][1] = vld1q_f32(x + r * ldx + i + 4);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const int16x8_t q = vmovl_s8(load(w + c * k + i));
      const float32x4_t b0 = vcvtq_f32_s32(vmovl_s16(vget_low_s16(q))), b1 = vcvtq_f32_s32(vmovl_high_s16(q));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][c] = vfmaq_f32(vfmaq_f32(sum[r][c], a[r][0], b0), a[r][1], b1);
    }
  };
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) step(i, [](const int8_t* p) { return vld1_s8(p); });
  if (i < k) step(i, [=](const int8_t* p) { return load_bytes_neon(p, k - i); });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = vaddvq_f32(sum[r][c]);
}

template <int R>
void tile_cols(const float* x, int64_t ldx, const int8_t* w, int64_t k, int cols, float (*sums)[kCols]) {
  switch (cols) {
    case 1:
      return tile<R, 1>(x, ldx, w, k, sums);
    case 2:
      return tile<R, 2>(x, ldx, w, k, sums);
    case 3:
      return tile<R, 3>(x, ldx, w, k, sums);
    default:
      return tile<R, 4>(x, ldx, w, k, sums);
  }
}

void dot(const float* x, int64_t ldx, int rows, const int8_t* w, int64_t k, int cols, float (*sums)[kCols]) {
  switch (rows) {
    case 1:
      return tile_cols<1>(x, ldx, w, k, cols, sums);
    case 2:
      return tile_cols<2>(x, ldx, w, k, cols, sums);
    case 3:
      return tile_cols<3>(x, ldx, w, k, cols, sums);
    default:
      return tile_cols<4>(x, ldx, w, k, cols, sums);
  }
}

}  // namespace

extern const Kernel kNeon;
const Kernel kNeon = {"neon", Isa::neon, 4, widen_neon, narrow_neon, dot};

}  // namespace pycompress::int8_weight
#endif
