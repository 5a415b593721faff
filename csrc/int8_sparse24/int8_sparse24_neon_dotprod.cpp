// NEON with dot products: tbl and sdot. They share pipes on most cores, so 2:4 multiplies as fast as a dense kernel and reads 5/8 of its
// bytes; 1:4 is twice as fast.
// Run under qemu only so far: see docs/kernels.md.
#include "int8_sparse24/neon_rows.h"
#if PC_HAVE_NEON_EXTENSIONS

namespace pycompress::int8_sparse24 {
namespace {

// 8 x 8: 16 accumulators, 2 vectors of indices, 2 controls, 2 of values, windows in flight.
constexpr int kMr = 8;

PC_TARGET_BEGIN(PC_NEON_DOTPROD)

template <int Kept, int kStep, int R, int C>
PC_INLINE void step(int32x4_t (&c)[R][2][C], const uint8_t* a, const uint8_t* panel, const uint8x16_t (&indices)[2]) {
  const uint8_t* window = a + window_offset<Kept, kStep>(R);
  const int8_t* values = reinterpret_cast<const int8_t*>(panel) + kStep * 4 * kNr;
  const uint8x16_t from[2] = {control<Kept, kStep>(indices[0]), control<Kept, kStep>(indices[1])};
  const int8x16_t w[2] = {vld1q_s8(values), vld1q_s8(values + 16)};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(window + 16 * r));
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) c[r][o][kStep % C] = vdotq_s32(c[r][o][kStep % C], vqtbl1q_s8(x, from[o]), w[o]);
  }
  __asm__ volatile("" ::: "memory");  // GCC would load the windows of all steps first, and spill
}

template <int Kept, int R>
void tile_rows(const uint8_t* a, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  constexpr int C = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // chains per row and vector: few rows would wait for the latency of sdot
  int32x4_t c[R][2][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) c[r][0][i] = c[r][1][i] = vdupq_n_s32(0);
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr), a += block_depth(Kept) * R) {
    if (ahead) prefetch_block(panel + ahead, kNr);
    const uint8x16_t indices[2] = {vld1q_u8(panel + 16 * kNr), vld1q_u8(panel + 16 * kNr + 16)};
    step<Kept, 0>(c, a, panel, indices);
    step<Kept, 1>(c, a, panel, indices);
    step<Kept, 2>(c, a, panel, indices);
    step<Kept, 3>(c, a, panel, indices);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 4
      for (int i = 1; i < C; ++i) c[r][o][0] = vaddq_s32(c[r][o][0], c[r][o][i]);
      vst1q_s32(acc + r * kNr + 4 * o, c[r][o][0]);
    }
}

template <int Kept>
void tile(const uint8_t* a, int rows, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  using Fn = void (*)(const uint8_t*, const uint8_t*, int64_t, int64_t, int32_t*);
  static constexpr Fn table[kMr] = {tile_rows<Kept, 1>, tile_rows<Kept, 2>, tile_rows<Kept, 3>, tile_rows<Kept, 4>,
                                    tile_rows<Kept, 5>, tile_rows<Kept, 6>, tile_rows<Kept, 7>, tile_rows<Kept, 8>};
  table[rows - 1](a, panel, blocks, ahead, acc);
}

PC_TARGET_END

}  // namespace

extern const Kernel kNeonDotprod;
const Kernel kNeonDotprod = {"neon_dotprod",
                             Isa::neon_dotprod,
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
