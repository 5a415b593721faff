// NEON with the int8 matrix product. smmla wants 8 bytes of one column side by side: two dwords (16 k) of a column are interleaved, and
// their low nibbles are then k = 0..3, 8..11, the high ones k = 4..7, 12..15. Rows are picked apart in the same way.
// Run under qemu only so far: see docs/kernels.md.
#include "int4_matmul/neon_rows.h"
#if PC_HAVE_NEON_EXTENSIONS

namespace pycompress::int8_matmul {
extern const Kernel kNeonI8mm;
}

namespace pycompress::int4_matmul {
namespace {

PC_TARGET_BEGIN(PC_NEON_I8MM)

// 4 x 16, in blocks of 2 x 2: 16 accumulators, 4 vectors of x, 4 of weights. The last row of an odd number is its own partner.
template <int R>
void rows_int8(const Group& g, int64_t row, int column) {
  constexpr int kPairs = (R + 1) / 2;
  const int8_t* q = static_cast<const int8_t*>(g.rows) + row * g.row_stride;
  const uint32_t* weight = g.weight + column;
  int32x4_t c[kPairs][8];
#pragma GCC unroll 2
  for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) c[p][v] = vdupq_n_s32(0);
  for (int64_t i = 0; i < g.depth; i += 16, weight += 2 * g.cols) {
    int8x16_t low[kPairs], high[kPairs];
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; ++p) {
      const int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(q + 2 * p * g.row_stride + i));
      const int32x4_t b = vreinterpretq_s32_s8(vld1q_s8(q + (2 * p + 1 < R ? 2 * p + 1 : 2 * p) * g.row_stride + i));
      low[p] = vreinterpretq_s8_s32(vuzp1q_s32(a, b)), high[p] = vreinterpretq_s8_s32(vuzp2q_s32(a, b));
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const uint32x4_t a = vld1q_u32(weight + 4 * v), b = vld1q_u32(weight + g.cols + 4 * v);
      const uint8x16_t w[2] = {vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))};
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const int8x16_t l = vreinterpretq_s8_u8(vandq_u8(w[h], vdupq_n_u8(15))), u = vreinterpretq_s8_u8(vshrq_n_u8(w[h], 4));
#pragma GCC unroll 2
        for (int p = 0; p < kPairs; ++p) c[p][2 * v + h] = vmmlaq_s32(c[p][2 * v + h], low[p], l);
#pragma GCC unroll 2
        for (int p = 0; p < kPairs; ++p) c[p][2 * v + h] = vmmlaq_s32(c[p][2 * v + h], high[p], u);
      }
      __asm__ volatile("" ::: "memory");  // GCC would load the weights of all columns first, and spill
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64x2_t a = vreinterpretq_s64_s32(c[p][2 * v]), b = vreinterpretq_s64_s32(c[p][2 * v + 1]);
      finish_int8_neon(g, row + 2 * p, column + 4 * v, vreinterpretq_s32_s64(vtrn1q_s64(a, b)));
      if (2 * p + 1 < R) finish_int8_neon(g, row + 2 * p + 1, column + 4 * v, vreinterpretq_s32_s64(vtrn2q_s64(a, b)));
    }
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

PC_TARGET_END

}  // namespace

extern const Kernel kNeonI8mm;
const Kernel kNeonI8mm = {"neon_i8mm",       Isa::neon_i8mm, kTileCols,        &int8_matmul::kNeonI8mm,
                          quantize_row_neon, group_int8,     group_float_neon, store_neon};

}  // namespace pycompress::int4_matmul
#endif
