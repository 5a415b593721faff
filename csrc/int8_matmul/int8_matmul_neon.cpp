// Baseline NEON: activations as int16 (q - zero_point), weights widened from int8 on load, smlal into int32. Exact for every input.
// Run under qemu only so far: see docs/kernels.md.
#include "int8_matmul/neon_rows.h"
#if PC_ARM64

namespace pycompress::int8_matmul {
namespace {

// 4 x 16: 16 accumulators, 2 vectors of b, 1 broadcast of a: 19 of 32 registers.
constexpr int kMr = 4, kNr = 16, kKr = 1;

template <int R>
void tile_rows(const void* const* a, int segments, int64_t depth, const int8_t* b, int32_t* acc) {
  int32x4_t c[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = c[r][2] = c[r][3] = vdupq_n_s32(0);
  for (int s = 0; s < segments; ++s, a += R)
    for (int64_t i = 0; i < depth; ++i, b += kNr) {
      const int8x16_t w = vld1q_s8(b);
      const int16x8_t w0 = vmovl_s8(vget_low_s8(w)), w1 = vmovl_high_s8(w);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int16x8_t x = vld1q_dup_s16(static_cast<const int16_t*>(a[r]) + i);
        c[r][0] = vmlal_s16(c[r][0], vget_low_s16(w0), vget_low_s16(x));
        c[r][1] = vmlal_high_s16(c[r][1], w0, x);
        c[r][2] = vmlal_s16(c[r][2], vget_low_s16(w1), vget_low_s16(x));
        c[r][3] = vmlal_high_s16(c[r][3], w1, x);
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 4; ++v) vst1q_s32(acc + r * kNr + 4 * v, c[r][v]);
}

void tile(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, int, int32_t* acc) {
  switch (rows) {
    case 1:
      return tile_rows<1>(a, segments, depth, b, acc);
    case 2:
      return tile_rows<2>(a, segments, depth, b, acc);
    case 3:
      return tile_rows<3>(a, segments, depth, b, acc);
    default:
      return tile_rows<4>(a, segments, depth, b, acc);
  }
}

}  // namespace

extern const Kernel kNeon;
const Kernel kNeon = {
    "neon", Isa::neon,           kMr,         kNr,     16,     kKr, 2, amax_neon, range_neon, quantize_row_s16, load_row_s16, widen_neon,
    tile,   store_f32_neon<kNr>, narrow_neon, nullptr, nullptr};

}  // namespace pycompress::int8_matmul
#endif
