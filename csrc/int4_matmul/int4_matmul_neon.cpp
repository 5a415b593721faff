// Baseline NEON. int8 activations: smull and smlal of u (0..15) with q into int16; 16 of them reach at most 16 * 15 * 127 = 30480, then
// pairs are added into int32.
// Run under qemu only so far: see docs/kernels.md.
#include "int4_matmul/neon_rows.h"
#if PC_ARM64

namespace pycompress::int8_matmul {
extern const Kernel kNeon;
}

namespace pycompress::int4_matmul {
namespace {

constexpr int64_t kFlush = 64;  // k per int16 sum: 16 steps of 4

// 4 columns times 4 k, twice: 2 vectors of 8 int16 per row and dword of columns.
template <int R>
PC_INLINE void step(const int8x16_t (&w)[2], const int8_t* q, int64_t stride, int16x8_t (&c)[R][4]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    int32_t four;
    std::memcpy(&four, q + r * stride, 4);
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
    c[r][0] = vmlal_s8(c[r][0], vget_low_s8(w[0]), vget_low_s8(x));
    c[r][1] = vmlal_high_s8(c[r][1], w[0], x);
    c[r][2] = vmlal_s8(c[r][2], vget_low_s8(w[1]), vget_low_s8(x));
    c[r][3] = vmlal_high_s8(c[r][3], w[1], x);
  }
#if defined(__GNUC__)
  __asm__ volatile("" ::: "memory");  // GCC would unpack the next weights first, and spill
#endif
}

// R rows, 8 columns: 16 int16 accumulators, 4 vectors of weights.
template <int R>
PC_INLINE void half(const Group& g, int64_t row, int column) {
  const int8_t* q = static_cast<const int8_t*>(g.rows) + row * g.row_stride;
  const uint8_t* weight = reinterpret_cast<const uint8_t*>(g.weight + column);
  int32x4_t total[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = vdupq_n_s32(0);
  for (int64_t begin = 0; begin < g.depth; begin += kFlush) {
    int16x8_t c[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = c[r][2] = c[r][3] = vdupq_n_s16(0);
    const int64_t end = begin + kFlush < g.depth ? begin + kFlush : g.depth;
    for (int64_t i = begin; i < end; i += 8, weight += 4 * g.cols) {
      const uint8x16_t w0 = vld1q_u8(weight), w1 = vld1q_u8(weight + 16), mask = vdupq_n_u8(15);
      const int8x16_t low[2] = {vreinterpretq_s8_u8(vandq_u8(w0, mask)), vreinterpretq_s8_u8(vandq_u8(w1, mask))};
      const int8x16_t high[2] = {vreinterpretq_s8_u8(vshrq_n_u8(w0, 4)), vreinterpretq_s8_u8(vshrq_n_u8(w1, 4))};
      step<R>(low, q + i, g.row_stride, c);
      step<R>(high, q + i + 4, g.row_stride, c);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) total[r][v] = vaddq_s32(total[r][v], vpaddq_s32(vpaddlq_s16(c[r][2 * v]), vpaddlq_s16(c[r][2 * v + 1])));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    finish_int8_neon(g, row + r, column, total[r][0]);
    finish_int8_neon(g, row + r, column + 4, total[r][1]);
  }
}

template <int R>
void rows_int8(const Group& g, int64_t row, int column) {
  half<R>(g, row, column);
  half<R>(g, row, column + 8);
}

void group_int8(const Group& g) {
  for (int column = 0; column < g.cols; column += kTileCols) {
    int64_t r = 0;
    for (; r + 4 <= g.count; r += 4) rows_int8<4>(g, r, column);
    switch (g.count - r) {
      case 1:
        rows_int8<1>(g, r, column);
        break;
      case 2:
        rows_int8<2>(g, r, column);
        break;
      case 3:
        rows_int8<3>(g, r, column);
        break;
      default:
        break;
    }
  }
}

}  // namespace

extern const Kernel kNeon;
const Kernel kNeon = {"neon", Isa::neon, kTileCols, &int8_matmul::kNeon, quantize_row_neon, group_int8, group_float_neon, store_neon};

}  // namespace pycompress::int4_matmul
#endif
