// 256-bit vpdpbusd: vpshufb picks the activations (u8, q + 128) that meet 32 kept weights out of a window of 16 k, one vpdpbusd multiplies
// and adds; half of the AVX2 kernel's instructions. The epilogue takes away 128 * (sum of values). Reading rows is the AVX2 kernel's.
//
// The body of two kernels, which differ in the encoding of one instruction only: int8_sparse24_avx_vnni.cpp (VEX) and
// int8_sparse24_avx512_vnni256.cpp (EVEX). Each defines PC_VNNI256_TARGET and PC_DPBUSD before the include.
#pragma once
#include <immintrin.h>

#include "int8_sparse24/int8_sparse24.h"

namespace pycompress::int8_sparse24 {

extern const Kernel kAvx2;

namespace {

// 12 x 8: 12 accumulators, control, values and a window: 15 of 16 registers. Reading a panel (3 instructions per 32 values) then costs an
// eighth of its use, so nothing is expanded.
constexpr int kMr = 12, kNr = 8;

int32_t offset(int8_t value) { return 128 * value; }  // operands are q + 128
float amax(const float* x, int64_t k) { return kAvx2.amax(x, k); }
void widen(const void* src, DType dtype, int64_t n, float* dst) { kAvx2.widen(src, dtype, n, dst); }
void narrow(const float* src, int64_t n, DType dtype, void* dst) { kAvx2.narrow(src, n, dtype, dst); }
void store_f32(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  kAvx2.store_f32(acc, rows, cols, e, out, ldo);
}

PC_TARGET_BEGIN(PC_VNNI256_TARGET)

PC_INLINE __m128i quantize8(const float* x, __m256 inverse) {
  // max/min return the second operand for NaN, so NaN ends as -127.
  const __m256 y = _mm256_max_ps(_mm256_mul_ps(_mm256_loadu_ps(x), inverse), _mm256_set1_ps(-127.0f));
  const __m256i q = _mm256_cvtps_epi32(_mm256_min_ps(y, _mm256_set1_ps(127.0f)));
  return _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
}

PC_INLINE void store_window(const float* x, __m256 inverse, uint8_t* dst) {
  const __m128i q = _mm_packs_epi16(quantize8(x, inverse), quantize8(x + 8, inverse));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm_xor_si128(q, _mm_set1_epi8(-128)));
}

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, uint8_t* dst, int64_t stride) {
  const __m256 inv = _mm256_set1_ps(inverse);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16, dst += stride) store_window(x + i, inv, dst);
  for (; i < kp; i += 16, dst += stride) {
    float tail[16] = {};
    if (i < k) std::memcpy(tail, x + i, static_cast<size_t>(k - i) * 4);
    store_window(tail, inv, dst);
  }
}

// Step kStep of a panel: 4 values of 8 outputs. Two steps of 2:4 share a window of 16 k, one of 1:4 has its own.
template <int Kept, int kStep, int R, int C>
PC_INLINE void step(__m256i (&c)[R][C], const uint8_t* a, const uint8_t* panel, __m256i indices) {
  const uint8_t* window = a + (Kept == 1 ? kStep : kStep / 2) * (R * 16);
  const __m256i base = _mm256_set1_epi32(Kept == 1 ? 0x0c080400 : 0x04040000 + kStep % 2 * 0x08080808);
  const __m256i control = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(indices, 2 * kStep), _mm256_set1_epi8(3)), base);
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * kStep));
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(window + r * 16)));
    c[r][kStep % C] = PC_DPBUSD(c[r][kStep % C], _mm256_shuffle_epi8(x, control), values);
  }
#if defined(__GNUC__)
  __asm__ volatile("" ::: "memory");  // GCC would read the panel for all steps first, and spill
#endif
}

template <int Kept, int R>
void tile_rows(const uint8_t* a, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  constexpr int C = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // chains per row: few rows would wait for vpdpbusd's latency
  __m256i c[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) c[r][i] = _mm256_setzero_si256();
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr), a += block_depth(Kept) * R) {
    if (ahead) prefetch_block(panel + ahead, kNr);
    const uint8_t* words = panel + 16 * kNr;
    step<Kept, 0>(c, a, panel, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
    step<Kept, 1>(c, a, panel, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
    step<Kept, 2>(c, a, panel, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
    step<Kept, 3>(c, a, panel, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 1; i < C; ++i) c[r][0] = _mm256_add_epi32(c[r][0], c[r][i]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kNr), c[r][0]);
  }
}

template <int Kept>
void tile(const uint8_t* a, int rows, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  using Fn = void (*)(const uint8_t*, const uint8_t*, int64_t, int64_t, int32_t*);
  static constexpr Fn table[kMr] = {tile_rows<Kept, 1>, tile_rows<Kept, 2>,  tile_rows<Kept, 3>,  tile_rows<Kept, 4>,
                                    tile_rows<Kept, 5>, tile_rows<Kept, 6>,  tile_rows<Kept, 7>,  tile_rows<Kept, 8>,
                                    tile_rows<Kept, 9>, tile_rows<Kept, 10>, tile_rows<Kept, 11>, tile_rows<Kept, 12>};
  table[rows - 1](a, panel, blocks, ahead, acc);
}

PC_TARGET_END

}  // namespace
}  // namespace pycompress::int8_sparse24
