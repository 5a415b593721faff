// AVX2: the shuffle that selects the activations also gives them the sign of their weight, so the product is |w| x (+-q).
//
// A 16-byte window holds 8 k and their negatives, [q0..q7, -q0..-q7]; a control byte is index + base (0 or 4) + 8 where w < 0.
// vpmaddubsw takes |w| as the unsigned operand (<= 128, so -128 is fine) and +-q as the signed one (|q| <= 127): a pair sum is at
// most 2 * 128 * 127 = 32512 and never saturates. A vector holds 8 outputs x 4 kept values = 8 k of 8 outputs.
//
// 1:4 needs 16 k for four values, so its windows are [q0..q15] and the sign comes by an exclusive or with s = -1 where w < 0: x ^ s is
// -x - 1, the product is too small by |w|, which the offsets give back. Pair sums stay inside -32768..32512.
//
// Reading a panel (shift, mask, sign, absolute value) costs twice its use, so for many rows a panel is first expanded to
// (|w|, control) pairs, 1:4 to (|w|, control, s). Measured on Zen 4: 46 dense-equivalent MAC per cycle, bound by shuffles and products
// sharing pipes; Zen 3, where they do not, reaches 56 (four rows, two vectors) on registers.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/activation_simd.h"
#include "core/float_rows.h"
#include "int8_sparse24/int8_sparse24.h"

namespace pycompress::int8_sparse24 {
namespace {

// 8 x 8: 8 accumulators, |w|, control, ones, and 5 windows in flight: all 16 registers.
constexpr int kMr = 8, kNr = 8;

int32_t offset(int8_t value) { return value < 0 ? value : 0; }  // of 1:4

PC_TARGET_BEGIN("avx2,fma,f16c")

PC_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

float amax(const float* x, int64_t k) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i best = _mm256_setzero_si256(), best1 = best;
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    best = _mm256_max_epu32(best, _mm256_and_si256(mask, load(x + i)));
    best1 = _mm256_max_epu32(best1, _mm256_and_si256(mask, load(x + i + 8)));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_max_epu32(best, best1));
  uint32_t top = 0;
  for (uint32_t v : lanes) top = v > top ? v : top;
  for (; i < k; ++i) {
    uint32_t u;
    std::memcpy(&u, x + i, 4);
    u &= 0x7fffffffu;
    top = u > top ? u : top;
  }
  float f;
  std::memcpy(&f, &top, 4);
  return f;
}

PC_INLINE __m128i quantize8(const float* x, __m256 inverse) {
  // max/min return the second operand for NaN, so NaN ends as -127.
  const __m256 y = _mm256_max_ps(_mm256_mul_ps(_mm256_loadu_ps(x), inverse), _mm256_set1_ps(-127.0f));
  const __m256i q = _mm256_cvtps_epi32(_mm256_min_ps(y, _mm256_set1_ps(127.0f)));
  return _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
}

template <int Kept>
PC_INLINE void store_window(const float* x, __m256 inverse, uint8_t* dst) {
  const __m128i low = quantize8(x, inverse), high = Kept == 1 ? quantize8(x + 8, inverse) : _mm_sub_epi16(_mm_setzero_si128(), low);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm_packs_epi16(low, high));
}

template <int Kept>
void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, uint8_t* dst, int64_t stride) {
  constexpr int kWindow = 16 / Kept;
  const __m256 inv = _mm256_set1_ps(inverse);
  int64_t i = 0;
  for (; i + kWindow <= k; i += kWindow, dst += stride) store_window<Kept>(x + i, inv, dst);
  if (i < k) {
    float tail[kWindow] = {};
    std::memcpy(tail, x + i, static_cast<size_t>(k - i) * 4);
    store_window<Kept>(tail, inv, dst);
    i += kWindow, dst += stride;
  }
  for (; i < kp; i += kWindow, dst += stride) _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm_setzero_si128());
}

// One step of a panel: 4 values of 8 outputs.
template <int Kept>
struct Step {
  __m256i magnitude, control, flip;

  // Control of step s: (indices >> 2s) & 3, + base, for 2:4 + 8 where the value is negative.
  PC_INLINE Step(__m256i indices, int shift, __m256i values) {
    const __m256i base = _mm256_set1_epi32(Kept == 1 ? 0x0c080400 : 0x04040000), three = _mm256_set1_epi8(3);
    control = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(indices, shift), three), base);
    magnitude = _mm256_abs_epi8(values);
    if constexpr (Kept == 1)
      flip = _mm256_cmpgt_epi8(_mm256_setzero_si256(), values);
    else
      control = _mm256_or_si256(control, _mm256_and_si256(_mm256_srli_epi16(values, 4), _mm256_set1_epi8(8)));
  }
  PC_INLINE explicit Step(const uint8_t* wide) : magnitude(load(wide)), control(load(wide + 32)) {
    if constexpr (Kept == 1) flip = load(wide + 64);
  }
  PC_INLINE void store(uint8_t* wide) const {
    _mm256_store_si256(reinterpret_cast<__m256i*>(wide), magnitude);
    _mm256_store_si256(reinterpret_cast<__m256i*>(wide + 32), control);
    if constexpr (Kept == 1) _mm256_store_si256(reinterpret_cast<__m256i*>(wide + 64), flip);
  }
};
template <int Kept>
constexpr int kStepBytes = Kept == 1 ? 96 : 64;

PC_INLINE __m256i window(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// One step of R rows. Four rows at a time and stage by stage: Zen 4 assigns pipes in program order, and the row by row order
// sends products and shuffles to the same one (43.8 instead of 46.4 MAC per cycle).
template <int Kept, int R>
PC_INLINE void products(__m256i (&c)[R], const uint8_t* a, const Step<Kept>& step, __m256i ones) {
#pragma GCC unroll 2
  for (int r0 = 0; r0 < R; r0 += 4) {
    constexpr int kGroup = 4;
    __m256i t[kGroup];
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r)
      if (r0 + r < R) t[r] = _mm256_shuffle_epi8(window(a + (r0 + r) * 16), step.control);
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r)
      if (Kept == 1 && r0 + r < R) t[r] = _mm256_xor_si256(t[r], step.flip);
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r)
      if (r0 + r < R) t[r] = _mm256_maddubs_epi16(step.magnitude, t[r]);
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r)
      if (r0 + r < R) t[r] = _mm256_madd_epi16(t[r], ones);
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r)
      if (r0 + r < R) c[r0 + r] = _mm256_add_epi32(c[r0 + r], t[r]);
  }
}

template <int Kept, int R>
void tile_rows(const uint8_t* a, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  __m256i c[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r] = _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr), a += 4 * R * 16) {
    if (ahead) prefetch_block(panel + ahead, kNr);
    const __m256i indices = load(panel + 16 * kNr);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const Step<Kept> step(indices, 2 * s, load(panel + 32 * s));
      products<Kept, R>(c, a + s * R * 16, step, ones);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kNr), c[r]);
}

template <int Kept>
void expand(const uint8_t* panel, int64_t blocks, void* wide) {
  uint8_t* d = static_cast<uint8_t*>(wide);
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr)) {
    const __m256i indices = load(panel + 16 * kNr);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s, d += kStepBytes<Kept>) Step<Kept>(indices, 2 * s, load(panel + 32 * s)).store(d);
  }
}

template <int Kept, int R>
void wide_rows(const uint8_t* a, const uint8_t* wide, int64_t steps, int32_t* acc, bool add) {
  __m256i c[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r] = add ? load(acc + r * kNr) : _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int64_t i = 0; i < steps; ++i, wide += kStepBytes<Kept>, a += R * 16) products<Kept, R>(c, a, Step<Kept>(wide), ones);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kNr), c[r]);
}

template <int Kept>
void tile(const uint8_t* a, int rows, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  using Fn = void (*)(const uint8_t*, const uint8_t*, int64_t, int64_t, int32_t*);
  static constexpr Fn table[kMr] = {tile_rows<Kept, 1>, tile_rows<Kept, 2>, tile_rows<Kept, 3>, tile_rows<Kept, 4>,
                                    tile_rows<Kept, 5>, tile_rows<Kept, 6>, tile_rows<Kept, 7>, tile_rows<Kept, 8>};
  table[rows - 1](a, panel, blocks, ahead, acc);
}

template <int Kept>
void tile_wide(const uint8_t* a, int rows, const void* wide, int64_t blocks, int32_t* acc, bool add) {
  using Fn = void (*)(const uint8_t*, const uint8_t*, int64_t, int32_t*, bool);
  static constexpr Fn table[kMr] = {wide_rows<Kept, 1>, wide_rows<Kept, 2>, wide_rows<Kept, 3>, wide_rows<Kept, 4>,
                                    wide_rows<Kept, 5>, wide_rows<Kept, 6>, wide_rows<Kept, 7>, wide_rows<Kept, 8>};
  table[rows - 1](a, static_cast<const uint8_t*>(wide), 4 * blocks, acc, add);
}

template <bool Plain>  // a full panel without activation: the stores need no mask
PC_INLINE void store_rows(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(cols), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i offsets = e.offsets ? load(e.offsets) : _mm256_setzero_si256();
  const __m256 sb = _mm256_maskload_ps(e.col_scale, mask), bias = e.bias ? _mm256_maskload_ps(e.bias, mask) : _mm256_setzero_ps();
  for (int r = 0; r < rows; ++r, acc += kNr, out += ldo) {
    const __m256 y =
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(load(acc), offsets)), _mm256_mul_ps(_mm256_set1_ps(e.row_scale[r]), sb), bias);
    Plain ? _mm256_storeu_ps(out, y) : _mm256_maskstore_ps(out, mask, activate_avx2(y, e.activation));
  }
}

void store_f32(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  e.activation == Activation::none&& cols == kNr ? store_rows<true>(acc, rows, cols, e, out, ldo)
                                                 : store_rows<false>(acc, rows, cols, e, out, ldo);
}

void widen(const void* src, DType dtype, int64_t n, float* dst) {
  const uint16_t* s = static_cast<const uint16_t*>(src);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i));
    _mm256_storeu_ps(dst + i,
                     dtype == DType::bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)) : _mm256_cvtph_ps(h));
  }
  for (; i < n; ++i) dst[i] = dtype == DType::bf16 ? bf16_to_float(s[i]) : f16_to_float(s[i]);
}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2",
                      Isa::avx2,
                      kMr,
                      kNr,
                      amax,
                      widen,
                      narrow_row,
                      store_f32,
                      {8, 16, nullptr, quantize_row<2>, tile<2>, expand<2>, tile_wide<2>, 256},
                      {16, 16, offset, quantize_row<1>, tile<1>, expand<1>, tile_wide<1>, 384}};

}  // namespace pycompress::int8_sparse24
#endif
