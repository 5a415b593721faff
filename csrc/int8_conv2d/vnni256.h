// 256-bit VNNI. Direct: the u8 x s8 tiles of int8_matmul. Winograd: int16 x int16 by vpdpwssd, which wraps, as winograd.cpp wants.
// What does not see operands is the AVX2 kernel's.
//
// The body of two kernels, which differ in the encoding of two instructions only: int8_conv2d_avx_vnni.cpp (VEX) and
// int8_conv2d_avx512_vnni256.cpp (EVEX). Each defines PC_VNNI256_TARGET and PC_DPWSSD before the include.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "int8_conv2d/int8_conv2d.h"

#if defined(__GNUC__)
#define PC_UNROLL _Pragma("GCC unroll 16")
#else
#define PC_UNROLL
#endif

namespace pycompress::int8_conv2d {

extern const Kernel kAvx2;

namespace {

void store_planes(const float* y, int64_t ld, int64_t pixels, int64_t cols, float* out, int64_t plane) {
  kAvx2.store_planes(y, ld, pixels, cols, out, plane);
}
void add_f32(float* y, const float* residual, int64_t n, Activation activation) { kAvx2.add_f32(y, residual, n, activation); }
void add_i8(float* y, const int8_t* residual, int64_t n, float scale, int zero_point, Activation activation) {
  kAvx2.add_i8(y, residual, n, scale, zero_point, activation);
}
void quantize_out(const float* y, int64_t ld, int64_t rows, int64_t cols, float inverse, int zero_point, int quant_min, int8_t* out,
                  int64_t ldo) {
  kAvx2.quantize_out(y, ld, rows, cols, inverse, zero_point, quant_min, out, ldo);
}
void center_i8(const void* x, int64_t n, int zero_point, float* dst) { kAvx2.center_i8(x, n, zero_point, dst); }
float round_row(const float* x, int64_t n, float inverse, float lo, float hi, float* dst) {
  return kAvx2.round_row(x, n, inverse, lo, hi, dst);
}
void split_phases(const float* line, int64_t cols, int64_t phases, int64_t phase_step, float* dst) {
  kAvx2.split_phases(line, cols, phases, phase_step, dst);
}
void depthwise_plane(const float* const* taps, const float* w, int64_t count, int64_t rows, int64_t cols, int64_t row_step, float scale,
                     float bias, Activation activation, float* out, int64_t ldo) {
  kAvx2.depthwise_plane(taps, w, count, rows, cols, row_step, scale, bias, activation, out, ldo);
}
void depthwise_pixels(const float* const* taps, const float* w, int64_t count, int64_t pixels, int64_t step, int64_t channels,
                      float image_scale, const float* scale, const float* bias, Activation activation, float* out) {
  kAvx2.depthwise_pixels(taps, w, count, pixels, step, channels, image_scale, scale, bias, activation, out);
}
void winograd_output(const int32_t* m, int64_t position_stride, float image_scale, const float* scale, const float* bias,
                     Activation activation, float* y, int64_t row_stride, int64_t pixel_stride) {
  kAvx2.winograd_output(m, position_stride, image_scale, scale, bias, activation, y, row_stride, pixel_stride);
}

PC_TARGET_BEGIN(PC_VNNI256_TARGET)

PC_INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

#include "int8_conv2d/winograd_simd.h"
#include "int8_conv2d/ymm_operands.h"  // NOLINT: after winograd_simd.h

void center_operands(const void* x, int64_t n, int correction, float* dst) {  // compilers make vectors of it
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(static_cast<const uint8_t*>(x)[i] - correction);
}

void winograd_weight(const int8_t* panel, int cols, int64_t channels, int16_t* u, int64_t position_stride) {
  // Four channels of 8 columns in 32 bytes; the shuffles put the bytes of two of them into the upper halves of words.
  const __m256i pairs[2] = {_mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13)),
                            _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15))};
  for (int64_t c = 0; c < channels; c += 4) {
    for (int i = 0; i < 4; ++i) {  // two channels, 8 columns
      const int pair = i / 2, half = i % 2;
      I16 w[3][6];
      PC_UNROLL
      for (int x = 0; x < 3; ++x) {
        I16 g[3];
        PC_UNROLL
        for (int y = 0; y < 3; ++y) {
          const int8_t* from = panel + ((y * 3 + x) * channels + c) * cols + half * 32;
          g[y].v = _mm256_srai_epi16(_mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), pairs[pair]), 8);
        }
        weight_transform(g[0], g[1], g[2], w[x], 1);
      }
      PC_UNROLL
      for (int y = 0; y < 6; ++y) {
        I16 r[6];
        weight_transform(w[0][y], w[1][y], w[2][y], r, 1);
        PC_UNROLL
        for (int x = 0; x < 6; ++x)
          _mm256_store_si256(reinterpret_cast<__m256i*>(u + (y * 6 + x) * position_stride + (c / 2 + pair) * 32 + half * 16), r[x].v);
      }
    }
  }
}

// 6 x 16: 12 accumulators, 2 vectors of weights, 1 broadcast: 15 of 16 registers.
template <int R>
void winograd_tile_rows(const int16_t* v, int64_t ld, int64_t channels, const int16_t* u, int32_t* acc) {
  __m256i c[R][2];
  const char* x[R];
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    c[r][0] = c[r][1] = _mm256_setzero_si256();
    x[r] = reinterpret_cast<const char*>(v + r * ld);
  }
  for (int64_t i = 0; i < channels / 2; ++i, u += 32) {
    const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(u)),
                  b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(u + 16));
    PC_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m256i pair = _mm256_set1_epi32(load32(x[r] + 4 * i));
      c[r][0] = PC_DPWSSD(c[r][0], pair, b0);
      c[r][1] = PC_DPWSSD(c[r][1], pair, b1);
    }
  }
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc + r * 16), c[r][0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc + r * 16 + 8), c[r][1]);
  }
}

void winograd_tile(const int16_t* v, int64_t ld, int rows, int64_t channels, const int16_t* u, int32_t* acc) {
  using Rows = void (*)(const int16_t*, int64_t, int64_t, const int16_t*, int32_t*);
  static constexpr Rows table[6] = {winograd_tile_rows<1>, winograd_tile_rows<2>, winograd_tile_rows<3>,
                                    winograd_tile_rows<4>, winograd_tile_rows<5>, winograd_tile_rows<6>};
  table[rows - 1](v, ld, channels, u, acc);
}

PC_TARGET_END

// Cycles measured in EVEX encoding on a Zen 4: tiles of 62.7 (direct) and 31.8 MAC per cycle, less what surrounds them.
constexpr Kernel record(const char* name, Isa isa, const Gemm* gemm) {
  return {name,
          isa,
          gemm,
          quantize_planes<uint8_t>,
          store_planes,
          add_f32,
          add_i8,
          quantize_out,
          center_i8,
          center_operands,
          round_row,
          split_phases,
          depthwise_plane,
          depthwise_pixels,
          6,
          {1.0 / 54, 1.0 / 28, 9.0, 4.5, 32.0},
          winograd_input<uint8_t>,
          winograd_weight,
          winograd_tile,
          winograd_output};
}

}  // namespace
}  // namespace pycompress::int8_conv2d
