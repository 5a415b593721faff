// NEON: rows by tbl (picks, per lane, the four bytes of one of four neighbours), columns by fmla from memory. Baseline aarch64.
//
// rows: a vector holds 4 outputs. tbl and fmla share pipes, so a kept value costs two operations where a dense kernel spends two (2:4) or
// four (1:4): the gain is in the weight's bytes, and few rows are bound by those.
// columns: 16 accumulators; every fmla has a load of its own, which most cores pair.
// Run under qemu only so far: see docs/kernels.md.
#include "core/activation_neon.h"
#if PC_ARM64
#include "core/half_neon.h"
#include "core/neon_tail.h"
#include "core/transpose_neon.h"
#include "sparse24_gemm/sparse24_gemm.h"

namespace pycompress::sparse24_gemm {
namespace {

constexpr int kNr = 8, kMr = 8, kMc = 64;

// Indices at bits 1:0 of every lane as positions of bytes.
PC_INLINE uint8x16_t control(uint32x4_t index) {
  const uint32x4_t position = vandq_u32(index, vdupq_n_u32(3));
  return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100u), position, vdupq_n_u32(0x04040404u)));
}

template <int Kept, int R>
void rows_tile(const float* a, const uint8_t* panel, int64_t blocks, float* acc) {
  constexpr int kDepth = block_depth(Kept);
  constexpr int C = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // chains per row and vector: few rows would wait for the latency of fmla
  float32x4_t c[R][2][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) c[r][0][i] = c[r][1][i] = vdupq_n_f32(0.0f);
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr), a += R * kDepth) {
    prefetch_block(panel + kAhead, kNr);
    const float* v = reinterpret_cast<const float*>(panel);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(panel + 64 * kNr);
    uint32x4_t index[2] = {vld1q_u32(words), vld1q_u32(words + 4)};
#pragma GCC unroll 1
    for (int h = 0; h < 4; ++h) {  // four values, out of 4 / Kept groups
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, v += kNr) {
        const uint8x16_t from[2] = {control(index[0]), control(index[1])};
        const float32x4_t w[2] = {vld1q_f32(v), vld1q_f32(v + 4)};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const uint8x16_t x = vreinterpretq_u8_f32(vld1q_f32(a + r * kDepth + (4 * h + i) / Kept * 4));
#pragma GCC unroll 2
          for (int o = 0; o < 2; ++o) c[r][o][i % C] = vfmaq_f32(c[r][o][i % C], w[o], vreinterpretq_f32_u8(vqtbl1q_u8(x, from[o])));
        }
        index[0] = vshrq_n_u32(index[0], 2), index[1] = vshrq_n_u32(index[1], 2);
#if defined(__GNUC__)
        // GCC would compute all controls first and load the activations of all values, and spill.
        __asm__ volatile("" : "+w"(index[0]), "+w"(index[1])::"memory");
#endif
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 4
      for (int i = 1; i < C; ++i) c[r][o][0] = vaddq_f32(c[r][o][0], c[r][o][i]);
      vst1q_f32(acc + r * kNr + 4 * o, c[r][o][0]);
    }
}

template <int Kept>
void rows(const float* a, int count, const uint8_t* panel, int64_t blocks, float* acc) {
  using Fn = void (*)(const float*, const uint8_t*, int64_t, float*);
  static constexpr Fn table[kMr] = {rows_tile<Kept, 1>, rows_tile<Kept, 2>, rows_tile<Kept, 3>, rows_tile<Kept, 4>,
                                    rows_tile<Kept, 5>, rows_tile<Kept, 6>, rows_tile<Kept, 7>, rows_tile<Kept, 8>};
  table[count - 1](a, panel, blocks, acc);
}

void store_rows(const float* acc, int rows, int cols, const float* bias, Activation activation, float* out, int64_t ldo) {
  for (int c = 0; c < cols; c += 4) {
    const float32x4_t add = bias ? load_first_neon(bias + c, cols - c) : vdupq_n_f32(0.0f);
    for (int r = 0; r < rows; ++r)
      store_first_neon(out + r * ldo + c, cols - c, activate_neon(vaddq_f32(vld1q_f32(acc + r * kNr + c), add), activation));
  }
}

// V vectors of 4 rows of x, O outputs: 16 fmla in flight.
template <int Kept, int V, int O>
PC_INLINE void columns_step(const float* xt, const uint8_t* panel, int64_t blocks, float* c, bool add) {
  constexpr int kCols = 4 * V;
  float32x4_t s[O][V];
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) s[o][v] = add ? vld1q_f32(c + o * kCols + 4 * v) : vdupq_n_f32(0.0f);
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr)) {
    const float* w = reinterpret_cast<const float*>(panel);
    uint32_t index[O];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) std::memcpy(&index[o], panel + 64 * kNr + 4 * o, 4);
#pragma GCC unroll 1
    for (int g = 0; g < 16 / Kept; ++g, xt += 4 * kCols)  // a group of four k
#pragma GCC unroll 2
      for (int i = 0; i < Kept; ++i, w += kNr)
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) {
          const float* row = xt + (index[o] & 3) * kCols;
          index[o] >>= 2;
          const float32x4_t weight = vld1q_dup_f32(w + o);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) s[o][v] = vfmaq_f32(s[o][v], vld1q_f32(row + 4 * v), weight);
#if defined(__GNUC__)
          __asm__ volatile("" ::: "memory");  // GCC would load the rows of all outputs first, and spill
#endif
        }
  }
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) vst1q_f32(c + o * kCols + 4 * v, s[o][v]);
}

template <int Kept, int V, int O>
void columns_tile(const float* xt, const uint8_t* panel, int64_t blocks, int outputs, float* c, bool add) {
  int o = 0;
  for (; o + O <= outputs; o += O) columns_step<Kept, V, O>(xt, panel + 4 * o, blocks, c + o * 4 * V, add);
  for (; o < outputs; ++o) columns_step<Kept, V, 1>(xt, panel + 4 * o, blocks, c + o * 4 * V, add);
}

template <int Kept>
void columns(const float* xt, int cols, const uint8_t* panel, int64_t blocks, int outputs, float* c, bool add) {
  switch (cols) {
    case 16:
      return columns_tile<Kept, 4, 4>(xt, panel, blocks, outputs, c, add);
    case 32:
      return columns_tile<Kept, 8, 2>(xt, panel, blocks, outputs, c, add);
    case 48:
      return columns_tile<Kept, 12, 1>(xt, panel, blocks, outputs, c, add);
    default:
      return columns_tile<Kept, 16, 1>(xt, panel, blocks, outputs, c, add);
  }
}

void transpose(const float* src, int64_t lds, int rows, int64_t count, float* dst, int64_t ldd, int padded) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* s = src + r * lds;
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
      float32x4_t v[4] = {vld1q_f32(s + k), vld1q_f32(s + lds + k), vld1q_f32(s + 2 * lds + k), vld1q_f32(s + 3 * lds + k)};
      transpose4_neon(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) vst1q_f32(dst + (k + i) * ldd + r, v[i]);
    }
    for (; k < count; ++k)
      for (int i = 0; i < 4; ++i) dst[k * ldd + r + i] = s[i * lds + k];
  }
  for (int64_t k = 0; k < count; ++k)
    for (int i = r; i < padded; ++i) dst[k * ldd + i] = i < rows ? src[i * lds + k] : 0.0f;
}

void finish(float* c, int cols, int64_t outputs, const float* bias, Activation activation) {
  if (!bias && activation == Activation::none) return;
  for (int64_t o = 0; o < outputs; ++o)
    for (int m = 0; m < cols; m += 4, c += 4)
      vst1q_f32(c, activate_neon(vaddq_f32(vld1q_f32(c), vdupq_n_f32(bias ? bias[o] : 0.0f)), activation));
}

void turn(const float* c, int cols, int outputs, int rows, const float* bias, Activation activation, float* out, int64_t ldo) {
  for (int m = 0; m < rows; m += 4)
    for (int o = 0; o < outputs; o += 4) {
      float32x4_t v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        v[i] = o + i < outputs
                   ? activate_neon(vaddq_f32(vld1q_f32(c + (o + i) * cols + m), vdupq_n_f32(bias ? bias[o + i] : 0.0f)), activation)
                   : vdupq_n_f32(0.0f);
      transpose4_neon(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        if (m + i < rows) store_first_neon(out + (m + i) * ldo + o, outputs - o, v[i]);
    }
}

}  // namespace

extern const Kernel kNeon;
const Kernel kNeon = {"neon",
                      Isa::neon,
                      kNr,
                      kMr,
                      kMc,
                      widen_neon,
                      narrow_neon,
                      store_rows,
                      transpose,
                      finish,
                      turn,
                      {8, rows<2>, columns<2>},
                      {8, rows<1>, columns<1>}};

}  // namespace pycompress::sparse24_gemm
#endif
