// NEON with dot products (Armv8.2 and later): activations s8, weights s8, sdot into int32, which wraps and never saturates.
// Run under qemu only so far: see docs/kernels.md.
#include "int8_matmul/neon_rows.h"
#if PC_HAVE_NEON_EXTENSIONS

namespace pycompress::int8_matmul {
namespace {

// 4 x 16: 16 accumulators, 4 vectors of b, 4 of a (16 k each): 24 of 32 registers.
constexpr int kMr = 4, kNr = 16, kKr = 4;

PC_TARGET_BEGIN(PC_NEON_DOTPROD)

template <int R, int kLane>
PC_INLINE void step(int32x4_t (&c)[R][4], const int8x16_t (&x)[R], const int8_t* b) {
  const int8x16_t w0 = vld1q_s8(b), w1 = vld1q_s8(b + 16), w2 = vld1q_s8(b + 32), w3 = vld1q_s8(b + 48);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    c[r][0] = vdotq_laneq_s32(c[r][0], w0, x[r], kLane);
    c[r][1] = vdotq_laneq_s32(c[r][1], w1, x[r], kLane);
    c[r][2] = vdotq_laneq_s32(c[r][2], w2, x[r], kLane);
    c[r][3] = vdotq_laneq_s32(c[r][3], w3, x[r], kLane);
  }
  __asm__ volatile("" ::: "memory");  // GCC would load the weights of all steps first, and spill
}

template <int R>
void tile_rows(const void* const* a, int segments, int64_t depth, const int8_t* b, int32_t* acc) {
  int32x4_t c[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = c[r][2] = c[r][3] = vdupq_n_s32(0);
  for (int s = 0; s < segments; ++s, a += R) {
    int8x16_t x[R];
    int64_t i = 0;
    for (; i + 16 <= depth; i += 16, b += 4 * kKr * kNr) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = vld1q_s8(static_cast<const int8_t*>(a[r]) + i);
      step<R, 0>(c, x, b);
      step<R, 1>(c, x, b + kKr * kNr);
      step<R, 2>(c, x, b + 2 * kKr * kNr);
      step<R, 3>(c, x, b + 3 * kKr * kNr);
    }
    for (; i < depth; i += kKr, b += kKr * kNr) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, static_cast<const int8_t*>(a[r]) + i, 4);
        x[r] = vreinterpretq_s8_s32(vdupq_n_s32(four));
      }
      step<R, 0>(c, x, b);
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

PC_TARGET_END

}  // namespace

extern const Kernel kNeonDotprod;
const Kernel kNeonDotprod = {"neon_dotprod",
                             Isa::neon_dotprod,
                             kMr,
                             kNr,
                             16,
                             kKr,
                             1,
                             amax_neon,
                             range_neon,
                             quantize_row_s8,
                             load_row_s8,
                             widen_neon,
                             tile,
                             store_f32_neon<kNr>,
                             narrow_neon,
                             nullptr,
                             nullptr,
                             true};

}  // namespace pycompress::int8_matmul
#endif
