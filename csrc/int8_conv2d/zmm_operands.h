// Floats to u8 operands on zmm registers. Included inside the target region and the anonymous namespace of a kernel file. No includes on
// purpose.
#pragma once

PC_INLINE __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

// One load for both uses of a vector: compilers fold it into the two instructions, which makes two of it, each often of two lines.
#if defined(__GNUC__)
#define PC_LOADED(v) __asm__("" : "+v"(v))
// An address that is not split into one induction variable per use: 16 planes would put 32 pointers on the stack.
#define PC_ADDRESS(p) __asm__("" : "+r"(p))
#else
#define PC_LOADED(v) ((void)0)
#define PC_ADDRESS(p) ((void)0)
#endif

struct Quantizer {
  __m512 inverse, hi;
  __m512i zero_point, lo;  // int16 and int8 lanes
  Quantizer(float inverse_, int zero_point_, int quant_min)
      : inverse(_mm512_set1_ps(inverse_)),
        hi(_mm512_set1_ps(static_cast<float>(127 - zero_point_))),
        zero_point(_mm512_set1_epi16(static_cast<int16_t>(zero_point_))),
        lo(_mm512_set1_epi8(static_cast<int8_t>(quant_min))) {}
  // Saturated from above in float, because the conversion turns large numbers into INT_MIN; from below by the packs.
  PC_INLINE __m512i round(__m512 x) const { return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_mul_ps(x, inverse), hi)); }
  // 4 x 16 int32 -> u8 operands, each 128-bit lane [a0..a3 b0..b3 c0..c3 d0..d3]
  PC_INLINE __m512i narrow(__m512i a, __m512i b, __m512i c, __m512i d) const {
    const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), zero_point),
                  cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), zero_point);
    return _mm512_xor_si512(_mm512_max_epi8(_mm512_packs_epi16(ab, cd), lo), _mm512_set1_epi8(-128));
  }
};

// Four channels of 16 pixels: each 128-bit lane holds 4 pixels of 4 bytes. What lies `ahead` elements from here is fetched: the planes
// are many streams, each too short for hardware to run ahead of.
template <bool kWhole>
PC_INLINE __m512i quantize4(const Quantizer& q, const float* x, int64_t plane, int64_t channels, __mmask16 m, int64_t ahead, __m512& bad) {
  const __m512 zero = _mm512_setzero_ps();
  const float* later = x + ahead;
  PC_ADDRESS(x);
  PC_ADDRESS(later);
  __m512i v[4];
  PC_UNROLL
  for (int i = 0; i < 4; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(later + i * plane), _MM_HINT_T0);
    __m512 f = kWhole ? _mm512_loadu_ps(x + i * plane) : i < channels ? _mm512_maskz_loadu_ps(m, x + i * plane) : zero;
    PC_LOADED(f);
    bad = _mm512_fmadd_ps(f, zero, bad);
    v[i] = q.round(f);
  }
  const __m512i by_pixel = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(q.narrow(v[0], v[1], v[2], v[3]), by_pixel);
}
