// NEON with dot products. int8 activations: the nibbles of a dword are 4 k of one column each, which is what sdot wants.
// Run under qemu only so far: see docs/kernels.md.
#include "int4_matmul/neon_rows.h"
#if PC_HAVE_NEON_EXTENSIONS

namespace pycompress::int8_matmul {
extern const Kernel kNeonDotprod;
}

namespace pycompress::int4_matmul {
namespace {

PC_TARGET_BEGIN(PC_NEON_DOTPROD)

// 8 k: two lanes of x, two nibbles.
template <int R, int kLane>
PC_INLINE void step(const uint32_t* weight, const int8x16_t (&x)[R], int32x4_t (&c)[R][4]) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const uint8x16_t w = vreinterpretq_u8_u32(vld1q_u32(weight + 4 * v));
    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15))), high = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) c[r][v] = vdotq_laneq_s32(c[r][v], low, x[r], kLane);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) c[r][v] = vdotq_laneq_s32(c[r][v], high, x[r], kLane + 1);
  }
  __asm__ volatile("" ::: "memory");  // GCC would unpack the weights of all steps first, and spill
}

// 4 x 16: 16 accumulators, 4 vectors of x, 2 of weights per column vector.
template <int R>
void rows_int8(const Group& g, int64_t row, int column) {
  const int8_t* q = static_cast<const int8_t*>(g.rows) + row * g.row_stride;
  const uint32_t* weight = g.weight + column;
  int32x4_t c[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = c[r][2] = c[r][3] = vdupq_n_s32(0);
  for (int64_t i = 0; i < g.depth; i += 16, weight += 2 * g.cols) {
    int8x16_t x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = vld1q_s8(q + r * g.row_stride + i);
    step<R, 0>(weight, x, c);
    step<R, 2>(weight + g.cols, x, c);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) finish_int8_neon(g, row + r, column + 4 * v, c[r][v]);
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

extern const Kernel kNeonDotprod;
const Kernel kNeonDotprod = {"neon_dotprod",    Isa::neon_dotprod, kTileCols,        &int8_matmul::kNeonDotprod,
                             quantize_row_neon, group_int8,        group_float_neon, store_neon};

}  // namespace pycompress::int4_matmul
#endif
