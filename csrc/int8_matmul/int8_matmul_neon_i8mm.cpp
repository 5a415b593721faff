// NEON with the int8 matrix product (Armv8.6, I8MM): smmla multiplies 2 rows by 2 columns, 8 k deep, into int32, which wraps.
// Run under qemu only so far: see docs/kernels.md.
#include "int8_matmul/neon_rows.h"
#if PC_HAVE_NEON_EXTENSIONS

namespace pycompress::int8_matmul {
namespace {

// 4 x 16, in blocks of 2 x 2: 16 accumulators, 8 vectors of b, 2 of a: 26 of 32 registers. (6 x 16 fits by count, but GCC spills.)
constexpr int kMr = 4, kNr = 16, kKr = 8;

PC_TARGET_BEGIN(PC_NEON_I8MM)

// Two rows, 8 k of each. The last row of an odd number is its own partner; what that sums is not stored.
template <int R>
PC_INLINE int8x16_t pair(const void* const* a, int p, int64_t i) {
  const int8_t* low = static_cast<const int8_t*>(a[2 * p]);
  const int8_t* high = static_cast<const int8_t*>(a[2 * p + 1 < R ? 2 * p + 1 : 2 * p]);
  return vcombine_s8(vld1_s8(low + i), vld1_s8(high + i));
}

template <int R>
void tile_rows(const void* const* a, int segments, int64_t depth, const int8_t* b, int32_t* acc) {
  constexpr int kPairs = (R + 1) / 2;
  int32x4_t c[kPairs][8];
#pragma GCC unroll 2
  for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) c[p][v] = vdupq_n_s32(0);
  for (int s = 0; s < segments; ++s, a += R)
    for (int64_t i = 0; i < depth; i += kKr, b += kKr * kNr) {
      int8x16_t x[kPairs];
#pragma GCC unroll 2
      for (int p = 0; p < kPairs; ++p) x[p] = pair<R>(a, p, i);
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) {
        const int8x16_t w = vld1q_s8(b + 16 * v);
#pragma GCC unroll 2
        for (int p = 0; p < kPairs; ++p) c[p][v] = vmmlaq_s32(c[p][v], x[p], w);
      }
    }
#pragma GCC unroll 2
  for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      vst1_s32(acc + 2 * p * kNr + 2 * v, vget_low_s32(c[p][v]));
      if (2 * p + 1 < R) vst1_s32(acc + (2 * p + 1) * kNr + 2 * v, vget_high_s32(c[p][v]));
    }
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

PC_TARGET_END

}  // namespace

extern const Kernel kNeonI8mm;
const Kernel kNeonI8mm = {"neon_i8mm", Isa::neon_i8mm,
                          kMr,         kNr,
                          16,          kKr,
                          1,           amax_neon,
                          range_neon,  quantize_row_s8,
                          load_row_s8, widen_neon,
                          tile,        store_f32_neon<kNr>,
                          narrow_neon, nullptr,
                          nullptr,     true};

}  // namespace pycompress::int8_matmul
#endif
