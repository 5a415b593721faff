// NEON: one record per GEMM of int8_matmul, which fixes the operands: int16 (neon) or s8 (neon_dotprod, neon_i8mm). The rest is baseline
// aarch64 and shared. Winograd saves 3 of 4 products but needs int16 ones: it serves neon; sdot and smmla do at least four times as many
// int8 products per instruction as smlal does of int16, so their direct way is no slower.
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
#include "int8_conv2d/winograd_simd.h"

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

// Winograd ------------------------------------------------------------------------------------------------------------

struct I16 {
  int16x8_t v;
  PC_INLINE I16 operator+(I16 o) const { return {vaddq_s16(v, o.v)}; }
  PC_INLINE I16 operator-(I16 o) const { return {vsubq_s16(v, o.v)}; }
  template <int n>
  PC_INLINE I16 shl() const {
    return {vshlq_n_s16(v, n)};
  }
};

struct I32 {  // unsigned: sums wrap
  uint32x4_t v;
  PC_INLINE I32 operator+(I32 o) const { return {vaddq_u32(v, o.v)}; }
  PC_INLINE I32 operator-(I32 o) const { return {vsubq_u32(v, o.v)}; }
  template <int n>
  PC_INLINE I32 shl() const {
    return {vshlq_n_u32(v, n)};
  }
};

// 8 channels of one tile, from rows of int16 operands to rows of v.
PC_INLINE void input_vector(const char* src, int64_t row_stride, int64_t pixel_stride, int16_t* v, int64_t position_stride) {
  I16 w[6][6];  // w[column][row]: the columns are done, the rows are not
  PC_UNROLL
  for (int x = 0; x < 6; ++x) {
    I16 d[6];
    PC_UNROLL
    for (int y = 0; y < 6; ++y) d[y].v = vld1q_s16(reinterpret_cast<const int16_t*>(src + y * row_stride + x * pixel_stride));
    input_transform(d, w[x], 1);
  }
  PC_UNROLL
  for (int y = 0; y < 6; ++y) {
    I16 d[6], r[6];
    PC_UNROLL
    for (int x = 0; x < 6; ++x) d[x] = w[x][y];
    input_transform(d, r, 1);
    PC_UNROLL
    for (int x = 0; x < 6; ++x) vst1q_s16(v + (y * 6 + x) * position_stride, r[x].v);
  }
}

void winograd_input(const void* src, int64_t row_stride, int64_t pixel_stride, int64_t channels, int, int16_t* v, int64_t position_stride) {
  const char* p = static_cast<const char*>(src);
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) input_vector(p + c * 2, row_stride, pixel_stride, v + c, position_stride);
  if (c == channels) return;
  // The rest through copies: whole vectors would read and write beyond the last pixel and tile.
  const size_t rest = static_cast<size_t>(channels - c) * 2;
  int16_t patch[36][8] = {}, out[36][8];
  for (int i = 0; i < 36; ++i) std::memcpy(patch[i], p + i / 6 * row_stride + i % 6 * pixel_stride + c * 2, rest);
  input_vector(reinterpret_cast<const char*>(patch), 6 * 16, 16, out[0], 8);
  for (int i = 0; i < 36; ++i) std::memcpy(v + i * position_stride + c, out[i], rest);
}

// u[36][channels][16]
void winograd_weight(const int8_t* panel, int cols, int64_t channels, int16_t* u, int64_t position_stride) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int half = 0; half < 16; half += 8) {
      I16 w[3][6];
      PC_UNROLL
      for (int x = 0; x < 3; ++x) {
        I16 g[3];
        PC_UNROLL
        for (int y = 0; y < 3; ++y) g[y].v = vmovl_s8(vld1_s8(panel + ((y * 3 + x) * channels + c) * cols + half));
        weight_transform(g[0], g[1], g[2], w[x], 1);
      }
      PC_UNROLL
      for (int y = 0; y < 6; ++y) {
        I16 r[6];
        weight_transform(w[0][y], w[1][y], w[2][y], r, 1);
        PC_UNROLL
        for (int x = 0; x < 6; ++x) vst1q_s16(u + (y * 6 + x) * position_stride + c * 16 + half, r[x].v);
      }
    }
  }
}

template <int R, int kLane>
PC_INLINE void tile_step(const int16x4_t (&x)[R], const int16_t* u, int32x4_t (&c)[R][4]) {
  const int16x8_t u0 = vld1q_s16(u), u1 = vld1q_s16(u + 8);
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    c[r][0] = vmlal_lane_s16(c[r][0], vget_low_s16(u0), x[r], kLane);
    c[r][1] = vmlal_high_lane_s16(c[r][1], u0, x[r], kLane);
    c[r][2] = vmlal_lane_s16(c[r][2], vget_low_s16(u1), x[r], kLane);
    c[r][3] = vmlal_high_lane_s16(c[r][3], u1, x[r], kLane);
  }
#if defined(__GNUC__)
  __asm__ volatile("" ::: "memory");  // GCC would load the weights of all steps first, and spill
#endif
}

// 4 x 16: 16 accumulators, 4 vectors of v, 2 of u.
template <int R>
void winograd_tile_rows(const int16_t* v, int64_t ld, int64_t channels, const int16_t* u, int32_t* acc) {
  int32x4_t c[R][4];
  PC_UNROLL
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = c[r][2] = c[r][3] = vdupq_n_s32(0);
  int16x4_t x[R];
  int64_t i = 0;
  for (; i + 4 <= channels; i += 4, u += 64) {
    PC_UNROLL
    for (int r = 0; r < R; ++r) x[r] = vld1_s16(v + r * ld + i);
    tile_step<R, 0>(x, u, c), tile_step<R, 1>(x, u + 16, c), tile_step<R, 2>(x, u + 32, c), tile_step<R, 3>(x, u + 48, c);
  }
  for (; i < channels; ++i, u += 16) {
    PC_UNROLL
    for (int r = 0; r < R; ++r) x[r] = vld1_dup_s16(v + r * ld + i);
    tile_step<R, 0>(x, u, c);
  }
  PC_UNROLL
  for (int r = 0; r < R; ++r) PC_UNROLL
  for (int o = 0; o < 4; ++o) vst1q_s32(acc + r * 16 + 4 * o, c[r][o]);
}

void winograd_tile(const int16_t* v, int64_t ld, int rows, int64_t channels, const int16_t* u, int32_t* acc) {
  using Rows = void (*)(const int16_t*, int64_t, int64_t, const int16_t*, int32_t*);
  static constexpr Rows table[4] = {winograd_tile_rows<1>, winograd_tile_rows<2>, winograd_tile_rows<3>, winograd_tile_rows<4>};
  table[rows - 1](v, ld, channels, u, acc);
}

void winograd_output(const int32_t* m, int64_t position_stride, float image_scale, const float* scale, const float* bias,
                     Activation activation, float* y, int64_t row_stride, int64_t pixel_stride) {
  for (int col = 0; col < 16; col += 4) {
    const float32x4_t s = vmulq_n_f32(vld1q_f32(scale + col), image_scale), b = vld1q_f32(bias + col);
    I32 w[6][4];  // w[column][row]
    PC_UNROLL
    for (int x = 0; x < 6; ++x) {
      I32 d[6];
      PC_UNROLL
      for (int r = 0; r < 6; ++r) d[r].v = vreinterpretq_u32_s32(vld1q_s32(m + (r * 6 + x) * position_stride + col));
      output_transform(d, w[x], 1);
    }
    PC_UNROLL
    for (int r = 0; r < 4; ++r) {
      I32 d[6], out[4];
      PC_UNROLL
      for (int x = 0; x < 6; ++x) d[x] = w[x][r];
      output_transform(d, out, 1);
      PC_UNROLL
      for (int x = 0; x < 4; ++x) {
        const float32x4_t f = vfmaq_f32(b, vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(vmulq_n_u32(out[x].v, kNinth)), 6)), s);
        vst1q_f32(y + r * row_stride + x * pixel_stride + col, activation == Activation::relu ? F::max(F::set(0.0f), f) : f);
      }
    }
  }
  if (activation > Activation::relu)
    for (int r = 0; r < 4; ++r)
      for (int x = 0; x < 4; ++x) activate_run(y + r * row_stride + x * pixel_stride, 16, activation);
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

constexpr Kernel with_winograd(Kernel kernel) {
  kernel.winograd_rows = 4;
  kernel.cost = {1.0 / 3.5, 1.0 / 3.8, 20.0, 10.0, 45.0};  // counted, for one smlal per cycle (Cortex-A72); never measured
  kernel.winograd_input = winograd_input;
  kernel.winograd_weight = winograd_weight;
  kernel.winograd_tile = winograd_tile;
  kernel.winograd_output = winograd_output;
  return kernel;
}

}  // namespace

extern const Kernel kNeon;
const Kernel kNeon = with_winograd(record<int16_t>("neon", Isa::neon, &int8_matmul::kNeon));
#if PC_HAVE_NEON_EXTENSIONS
extern const Kernel kNeonDotprod;
const Kernel kNeonDotprod = record<int8_t>("neon_dotprod", Isa::neon_dotprod, &int8_matmul::kNeonDotprod);
extern const Kernel kNeonI8mm;
const Kernel kNeonI8mm = record<int8_t>("neon_i8mm", Isa::neon_i8mm, &int8_matmul::kNeonI8mm);
#endif

}  // namespace pycompress::int8_conv2d
#endif
