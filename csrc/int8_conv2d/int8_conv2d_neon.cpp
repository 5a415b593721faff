// NEON: one record per GEMM of int8_matmul, which fixes the operands: int16 (neon) or s8 (neon_dotprod, neon_i8mm). The rest is baseline
// aarch64 and shared. No Winograd: the s8 kernels would need a second set of int16 tiles for it.
// Run under qemu only so far: see docs/kernels.md.
#include "int8_matmul/neon_rows.h"
#if PC_ARM64
#include "core/neon_tail.h"
#include "core/transpose_neon.h"
#include "int8_conv2d/int8_conv2d.h"

namespace pycompress::int8_matmul {
extern const Kernel kNeon;
#if PC_HAVE_NEON_EXTENSIONS
extern const Kernel kNeonDotprod;
extern const Kernel kNeonI8mm;
#endif
}  // namespace pycompress::int8_matmul

#if defined(__GNUC__)
#define PC_LAMBDA_INLINE __attribute__((always_inline))
#define PC_UNROLL _Pragma("GCC unroll 16")
#else
#define PC_LAMBDA_INLINE
#define PC_UNROLL
#endif

namespace pycompress::int8_conv2d {
namespace {

struct F {
  using reg = float32x4_t;
  static constexpr int lanes = 4;
  static PC_INLINE reg load(const float* p) { return vld1q_f32(p); }
  static PC_INLINE reg load_first(const float* p, int n) { return load_first_neon(p, n); }
  static PC_INLINE void store(float* p, reg v) { vst1q_f32(p, v); }
  static PC_INLINE void store_first(float* p, int n, reg v) { store_first_neon(p, n, v); }
  static PC_INLINE reg set(float v) { return vdupq_n_f32(v); }
  static PC_INLINE reg fma(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
  static PC_INLINE reg mac(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
  static PC_INLINE reg add(reg a, reg b) { return vaddq_f32(a, b); }
  static PC_INLINE reg mul(reg a, reg b) { return vmulq_f32(a, b); }
  static PC_INLINE reg min(reg a, reg b) { return vminq_f32(a, b); }
  static PC_INLINE reg max(reg a, reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // NaN in a gives b, NaN and -0 in b stay
  static PC_INLINE reg round(reg a) { return vrndnq_f32(a); }
  static PC_INLINE reg activate(reg y, Activation a) { return activate_neon(y, a); }
};

#include "int8_conv2d/float_simd.h"

// 8 x 8 int16: rows become columns.
PC_INLINE void transpose(int16x8_t (&v)[8]) {
  int32x4_t pairs[8];  // [2 i + j]: of rows 2 i and 2 i + 1, the elements with parity j
  PC_UNROLL
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = vreinterpretq_s32_s16(vtrn1q_s16(v[2 * i], v[2 * i + 1]));
    pairs[2 * i + 1] = vreinterpretq_s32_s16(vtrn2q_s16(v[2 * i], v[2 * i + 1]));
  }
  PC_UNROLL
  for (int j = 0; j < 2; ++j) {
    const int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(pairs[j], pairs[2 + j])),
                    b = vreinterpretq_s64_s32(vtrn2q_s32(pairs[j], pairs[2 + j])),
                    c = vreinterpretq_s64_s32(vtrn1q_s32(pairs[4 + j], pairs[6 + j])),
                    d = vreinterpretq_s64_s32(vtrn2q_s32(pairs[4 + j], pairs[6 + j]));
    v[j] = vreinterpretq_s16_s64(vtrn1q_s64(a, c)), v[4 + j] = vreinterpretq_s16_s64(vtrn2q_s64(a, c));
    v[2 + j] = vreinterpretq_s16_s64(vtrn1q_s64(b, d)), v[6 + j] = vreinterpretq_s16_s64(vtrn2q_s64(b, d));
  }
}

struct Quantizer {
  float inverse;
  float32x4_t lo, hi;
  int16x8_t zero_point;
};

PC_INLINE void put(const Quantizer&, char* d, int16x8_t v, int16_t) { vst1q_s16(reinterpret_cast<int16_t*>(d), v); }
PC_INLINE void put(const Quantizer& q, char* d, int16x8_t v, int8_t) {
  vst1_s8(reinterpret_cast<int8_t*>(d), vmovn_s16(vaddq_s16(v, q.zero_point)));
}

// Up to 8 channels of up to 8 pixels.
template <class Operand, bool kWhole>
PC_INLINE void quantize_block(const Quantizer& q, const float* x, int64_t plane, int64_t channels, int64_t pixels, char* d,
                              int64_t pixel_stride, float32x4_t* bad) {
  const float32x4_t zero = vdupq_n_f32(0.0f);
  int16x8_t v[8];
  PC_UNROLL
  for (int i = 0; i < 8; ++i) {
    float32x4_t a = zero, b = zero;
    const float* s = x + i * plane;
    if (kWhole) {
      a = vld1q_f32(s), b = vld1q_f32(s + 4);
    } else if (i < channels) {
      a = load_first_neon(s, static_cast<int>(pixels));
      if (pixels > 4) b = load_first_neon(s + 4, static_cast<int>(pixels - 4));
    }
    bad[0] = vfmaq_f32(bad[0], a, zero), bad[1] = vfmaq_f32(bad[1], b, zero);
    v[i] = vcombine_s16(vmovn_s32(int8_matmul::quantize4(a, q.inverse, q.lo, q.hi)),
                        vmovn_s32(int8_matmul::quantize4(b, q.inverse, q.lo, q.hi)));
  }
  transpose(v);
  PC_UNROLL
  for (int p = 0; p < 8; ++p)
    if (kWhole || p < pixels) put(q, d + p * pixel_stride, v[p], Operand{});
}

template <class Operand>
float quantize_planes(const float* x, int64_t plane, int64_t row, int64_t channels, int64_t rows, int64_t pixels, float inverse,
                      int zero_point, int quant_min, char* dst, int64_t row_stride, int64_t pixel_stride) {
  const Quantizer q = {inverse, vdupq_n_f32(static_cast<float>(quant_min - zero_point)), vdupq_n_f32(static_cast<float>(127 - zero_point)),
                       vdupq_n_s16(static_cast<int16_t>(zero_point))};
  float32x4_t bad[2] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
  // The incomplete block of channels first: what its stores write too much is overwritten by the next pixel's blocks.
  for (int64_t c = channels % 8 ? channels / 8 * 8 : channels - 8; c >= 0; c -= 8) {
    for (int64_t y = 0; y < rows; ++y) {
      const float* f = x + c * plane + y * row;
      char* d = dst + y * row_stride + c * static_cast<int64_t>(sizeof(Operand));
      int64_t p = 0;
      if (channels - c >= 8)
        for (; p + 8 <= pixels; p += 8) quantize_block<Operand, true>(q, f + p, plane, 8, 8, d + p * pixel_stride, pixel_stride, bad);
      for (; p < pixels; p += 8)
        quantize_block<Operand, false>(q, f + p, plane, channels - c, pixels - p, d + p * pixel_stride, pixel_stride, bad);
    }
  }
  return vaddvq_f32(vaddq_f32(bad[0], bad[1]));
}

void quantize_out(const float* y, int64_t ld, int64_t rows, int64_t cols, float inverse, int zero_point, int quant_min, int8_t* out,
                  int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r)  // there, NaN becomes the zero point
    int8_matmul::quantize_row_s8(y + r * ld, cols, cols, inverse, zero_point, quant_min, out + r * ldo);
}

void store_planes(const float* y, int64_t ld, int64_t pixels, int64_t cols, float* out, int64_t plane) {
  // Columns outside: every column is a page of its own, so what goes to one is written together.
  for (int64_t c = 0; c < cols; c += 4) {
    for (int64_t p = 0; p < pixels; p += 4) {
      const float* s = y + p * ld + c;
      float32x4_t col[4] = {vld1q_f32(s), vld1q_f32(s + ld), vld1q_f32(s + 2 * ld), vld1q_f32(s + 3 * ld)};
      transpose4_neon(col);
      float* o = out + c * plane + p;
      if (cols - c >= 4 && pixels - p >= 4) {
        PC_UNROLL
        for (int i = 0; i < 4; ++i) vst1q_f32(o + i * plane, col[i]);
      } else {
        PC_UNROLL
        for (int i = 0; i < 4; ++i)
          if (i < cols - c) store_first_neon(o + i * plane, static_cast<int>(pixels - p < 4 ? pixels - p : 4), col[i]);
      }
    }
  }
}

void split_phases(const float* line, int64_t cols, int64_t phases, int64_t phase_step, float* dst) {
  if (phases != 2) {
    for (int64_t f = 0; f < phases; ++f)
      for (int64_t x = f, i = f * phase_step; x < cols; x += phases) dst[i++] = line[x];
    return;
  }
  int64_t x = 0, i = 0;
  for (; x + 8 <= cols; x += 8, i += 4) {
    const float32x4x2_t v = vld2q_f32(line + x);
    vst1q_f32(dst + i, v.val[0]);
    vst1q_f32(dst + phase_step + i, v.val[1]);
  }
  for (; x < cols; ++x) dst[x % 2 * phase_step + x / 2] = line[x];
}

template <class Operand>
constexpr Kernel record(const char* name, Isa isa, const Gemm* gemm) {
  return {name,
          isa,
          gemm,
          quantize_planes<Operand>,
          store_planes,
          add_f32,
          add_i8,
          quantize_out,
          center<int8_t>,
          center<Operand>,
          round_row,
          split_phases,
          depthwise_plane,
          depthwise_pixels,
          0,
          {},
          nullptr,
          nullptr,
          nullptr,
          nullptr};
}

}  // namespace

extern const Kernel kNeon;
const Kernel kNeon = record<int16_t>("neon", Isa::neon, &int8_matmul::kNeon);
#if PC_HAVE_NEON_EXTENSIONS
extern const Kernel kNeonDotprod;
const Kernel kNeonDotprod = record<int8_t>("neon_dotprod", Isa::neon_dotprod, &int8_matmul::kNeonDotprod);
extern const Kernel kNeonI8mm;
const Kernel kNeonI8mm = record<int8_t>("neon_i8mm", Isa::neon_i8mm, &int8_matmul::kNeonI8mm);
#endif

}  // namespace pycompress::int8_conv2d
#endif
