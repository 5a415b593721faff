// What the NEON kernels of int4_matmul share: rows in, float activations, results out. Baseline aarch64 only; everything is static, a
// copy per file. A kernel file adds the tile for int8 activations.
#pragma once
#include "core/neon_tail.h"
#include "int8_matmul/neon_rows.h"
#if PC_ARM64
#include "int4_matmul/int4_matmul.h"

namespace pycompress::int4_matmul {

// Register tiles are 4 x 16: 16 accumulators of 32 registers.
inline constexpr int kTileRows = 4, kTileCols = 16;

static inline void quantize_row_neon(const float* x, int64_t k, int64_t kp, float inverse, int8_t* q) {
  int8_matmul::quantize_row_s8(x, k, kp, inverse, 0, -127, q);
}

// Zero points of 4 columns.
static PC_INLINE int32x4_t zeros_neon(const uint8_t* zero, int c) {
  if (!zero) return vdupq_n_s32(8);
  uint32_t four;
  std::memcpy(&four, zero + c, 4);
  const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
}

// acc += (total - zero * sum) * scale for 4 columns of one row; sum: of q over the group.
static PC_INLINE void finish_int8_neon(const Group& g, int64_t row, int column, int32x4_t total) {
  const int32_t sum = *reinterpret_cast<const int32_t*>(static_cast<const char*>(g.sums) + row * g.sum_stride);
  float* acc = g.acc + row * kNr + column;
  const float32x4_t exact = vcvtq_f32_s32(vmlsq_n_s32(total, zeros_neon(g.zero, column), sum));
  vst1q_f32(acc, vfmaq_f32(vld1q_f32(acc), exact, vld1q_f32(g.scale + column)));
}

// One nibble of 4 columns as u * 2^kShift, times one lane of x per row.
template <int R, int V, int kI>
static PC_INLINE void step_neon(const uint32_t* weight, const float32x4_t (&x)[R], float32x4_t (&c)[R][V]) {
  float32x4_t w[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const uint32x4_t from = vld1q_u32(weight + 4 * v);
    const uint32x4_t u = kI == 7 ? vshrq_n_u32(from, 28) : vandq_u32(from, vdupq_n_u32(15u << kShift[kI]));
    w[v] = vcvtq_f32_s32(vreinterpretq_s32_u32(u));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) c[r][v] = vfmaq_laneq_f32(c[r][v], w[v], x[r], kI % 4);
#if defined(__GNUC__)
  __asm__ volatile("" ::: "memory");  // GCC would convert the weights of all steps first, and spill
#endif
}

// R rows, 4 V columns.
template <int R, int V>
static PC_INLINE void rows_float_neon(const Group& g, int64_t row, int column) {
  const char* rows = static_cast<const char*>(g.rows) + row * g.row_stride;
  float32x4_t c[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) c[r][v] = vdupq_n_f32(0.0f);
  const uint32_t* weight = g.weight + column;
  for (int64_t i = 0; i < g.depth; i += 8, weight += g.cols) {
    float32x4_t x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = vld1q_f32(reinterpret_cast<const float*>(rows + r * g.row_stride) + i);
    step_neon<R, V, 0>(weight, x, c), step_neon<R, V, 1>(weight, x, c), step_neon<R, V, 2>(weight, x, c), step_neon<R, V, 3>(weight, x, c);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = vld1q_f32(reinterpret_cast<const float*>(rows + r * g.row_stride) + i + 4);
    step_neon<R, V, 4>(weight, x, c), step_neon<R, V, 5>(weight, x, c), step_neon<R, V, 6>(weight, x, c), step_neon<R, V, 7>(weight, x, c);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const float32x4_t scale = vld1q_f32(g.scale + column + 4 * v), zero = vcvtq_f32_s32(zeros_neon(g.zero, column + 4 * v));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float sum = *reinterpret_cast<const float*>(static_cast<const char*>(g.sums) + (row + r) * g.sum_stride);
      float* acc = g.acc + (row + r) * kNr + column + 4 * v;
      vst1q_f32(acc, vfmaq_f32(vld1q_f32(acc), vfmsq_n_f32(c[r][v], zero, sum), scale));
    }
  }
}

template <int R>
static inline void panel_float_neon(const Group& g, int64_t row) {
  int column = 0;
  if (R == 1)  // 8 chains of fma hide their latency
    for (; column + 32 <= g.cols; column += 32) rows_float_neon<1, 8>(g, row, column);
  for (; column < g.cols; column += kTileCols) rows_float_neon<R, 4>(g, row, column);
}

static inline void group_float_neon(const Group& g) {
  int64_t r = 0;
  for (; r + 4 <= g.count; r += 4) panel_float_neon<4>(g, r);
  switch (g.count - r) {
    case 1:
      return panel_float_neon<1>(g, r);
    case 2:
      return panel_float_neon<2>(g, r);
    case 3:
      return panel_float_neon<3>(g, r);
    default:
      return;
  }
}

// acc has kNr columns in memory, however few are used: only bias and out end at `cols`.
template <Activation kActivation>
static PC_INLINE void store_rows_neon(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  for (int c = 0; c < cols; c += 4) {
    const float32x4_t bias = e.bias ? load_first_neon(e.bias + c, cols - c) : vdupq_n_f32(0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const float32x4_t y = vfmaq_n_f32(bias, vld1q_f32(acc + r * kNr + c), e.row_scale[r]);
      store_first_neon(out + r * ldo + c, cols - c, activate_neon(y, kActivation));
    }
  }
}

static inline void store_neon(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  PC_WITH_ACTIVATION(e.activation, store_rows_neon, acc, rows, cols, e, out, ldo)
}

}  // namespace pycompress::int4_matmul
#endif
