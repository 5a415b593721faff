// 256-bit vpdpbusd. int8 activations: u (0..15) times q straight into int32. Everything else is the AVX2 kernel's.
//
// The body of two kernels, which differ in the encoding of one instruction only: int4_matmul_avx_vnni.cpp (VEX) and
// int4_matmul_avx512_vnni256.cpp (EVEX). Each defines PC_VNNI256_TARGET and PC_DPBUSD before the include.
#pragma once
#include <immintrin.h>

#include "int4_matmul/int4_matmul.h"

namespace pycompress::int4_matmul {

extern const Kernel kAvx2;

namespace {

constexpr int kNv = 8;

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, int8_t* q) { kAvx2.quantize_row(x, k, kp, inverse, q); }
void group_float(const Group& g) { kAvx2.group_float(g); }
void store(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  kAvx2.store(acc, rows, cols, e, out, ldo);
}

PC_TARGET_BEGIN(PC_VNNI256_TARGET)

#include "int4_matmul/ymm_int8.h"  // NOLINT: inside the region on purpose

// 6 x 16: 12 accumulators, 2 vectors of weights, 1 broadcast: 15 of 16 registers. Not inlined: next to what follows, GCC spills.
template <int R>
#if defined(__GNUC__)
__attribute__((noinline))
#endif
void products(const int8_t* q, int64_t stride, const uint8_t* wide, int64_t depth, int32_t* part) {
  __m256i c[R][2];
  const char* x[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    c[r][0] = c[r][1] = _mm256_setzero_si256();
    x[r] = reinterpret_cast<const char*>(q + r * stride);
  }
  for (int64_t i = 0; i < depth; i += 4, wide += 64) {
    const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(wide)),
                  w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(wide + 32));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i four = _mm256_set1_epi32(load32(x[r] + i));
      c[r][0] = PC_DPBUSD(c[r][0], w0, four);
      c[r][1] = PC_DPBUSD(c[r][1], w1, four);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(part + r * 16), c[r][0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(part + r * 16 + 8), c[r][1]);
  }
}

template <int R>
PC_INLINE void rows_int8(const Group& g, const int8_t* q, int64_t row, const uint8_t* wide, int column, int vectors) {
  alignas(32) int32_t part[R * 16];
  products<R>(q, g.row_stride, wide, g.depth, part);
  if (vectors == 2)
    finish_int8<R, 2>(g, row, column, part);
  else
    finish_int8<R, 1>(g, row, column, part);
}

PC_TARGET_END

}  // namespace
}  // namespace pycompress::int4_matmul
