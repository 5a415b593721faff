// Baseline NEON: tbl, then smull and smlal over two steps: |w| <= 128 and |q| <= 127, so two products reach at most 32512 and fit int16.
// Run under qemu only so far: see docs/kernels.md.
#include "int8_sparse24/neon_rows.h"
#if PC_ARM64

namespace pycompress::int8_sparse24 {
namespace {

// 4 x 8: 16 accumulators (two per vector of outputs: pairs of values stay apart until the end), 4 controls, 4 vectors of values, products.
constexpr int kMr = 4;

template <int Kept, int kStep, int R>
PC_INLINE void two_steps(int32x4_t (&c)[R][4], const uint8_t* a, const uint8_t* panel, const uint8x16_t (&indices)[2]) {
  const uint8_t *window0 = a + window_offset<Kept, kStep>(R), *window1 = a + window_offset<Kept, kStep + 1>(R);
  const int8_t* values = reinterpret_cast<const int8_t*>(panel) + kStep * 4 * kNr;
#pragma GCC unroll 2
  for (int o = 0; o < 2; ++o) {
    const uint8x16_t from0 = control<Kept, kStep>(indices[o]), from1 = control<Kept, kStep + 1>(indices[o]);
    const int8x16_t w0 = vld1q_s8(values + 16 * o), w1 = vld1q_s8(values + 4 * kNr + 16 * o);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int8x16_t x0 = vqtbl1q_s8(vreinterpretq_s8_u8(vld1q_u8(window0 + 16 * r)), from0),
                      x1 = vqtbl1q_s8(vreinterpretq_s8_u8(vld1q_u8(window1 + 16 * r)), from1);
      const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(x0), vget_low_s8(w0)), vget_low_s8(x1), vget_low_s8(w1));
      const int16x8_t high = vmlal_high_s8(vmull_high_s8(x0, w0), x1, w1);
      c[r][2 * o] = vpadalq_s16(c[r][2 * o], low);
      c[r][2 * o + 1] = vpadalq_s16(c[r][2 * o + 1], high);
    }
#if defined(__GNUC__)
    __asm__ volatile("" ::: "memory");  // GCC would load the windows of all steps first, and spill
#endif
  }
}

template <int Kept, int R>
void tile_rows(const uint8_t* a, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  int32x4_t c[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = c[r][2] = c[r][3] = vdupq_n_s32(0);
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr), a += block_depth(Kept) * R) {
    if (ahead) prefetch_block(panel + ahead, kNr);
    const uint8x16_t indices[2] = {vld1q_u8(panel + 16 * kNr), vld1q_u8(panel + 16 * kNr + 16)};
    two_steps<Kept, 0>(c, a, panel, indices);
    two_steps<Kept, 2>(c, a, panel, indices);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    vst1q_s32(acc + r * kNr, vpaddq_s32(c[r][0], c[r][1]));
    vst1q_s32(acc + r * kNr + 4, vpaddq_s32(c[r][2], c[r][3]));
  }
}

template <int Kept>
void tile(const uint8_t* a, int rows, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  using Fn = void (*)(const uint8_t*, const uint8_t*, int64_t, int64_t, int32_t*);
  static constexpr Fn table[kMr] = {tile_rows<Kept, 1>, tile_rows<Kept, 2>, tile_rows<Kept, 3>, tile_rows<Kept, 4>};
  table[rows - 1](a, panel, blocks, ahead, acc);
}

}  // namespace

extern const Kernel kNeon;
const Kernel kNeon = {"neon",
                      Isa::neon,
                      kMr,
                      kNr,
                      int8_matmul::amax_neon,
                      widen_neon,
                      narrow_neon,
                      store_f32_neon,
                      {16, 16, nullptr, quantize_row_neon, tile<2>, nullptr, nullptr, 0},
                      {16, 16, nullptr, quantize_row_neon, tile<1>, nullptr, nullptr, 0}};

}  // namespace pycompress::int8_sparse24
#endif
