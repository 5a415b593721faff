// Operands out of floats and into Winograd's input transform on ymm registers, for int16 (AVX2) and u8 (256-bit VNNI). Included inside
// the target region and the anonymous namespace of a kernel file, behind winograd_simd.h. No includes on purpose.
#pragma once

struct Quantizer {
  __m256 inverse, lo, hi;
  __m128i offset;
  Quantizer(float inverse_, int zero_point, int quant_min)
      : inverse(_mm256_set1_ps(inverse_)),
        lo(_mm256_set1_ps(static_cast<float>(quant_min - zero_point))),
        hi(_mm256_set1_ps(static_cast<float>(127 - zero_point))),
        offset(_mm_set1_epi16(static_cast<int16_t>(128 + zero_point))) {}
  PC_INLINE __m256i round(__m256 x) const { return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, inverse), lo), hi)); }
};

// 8 channels of pixel i, as q - zero_point: int16 operands are that, u8 ones are q + 128.
PC_INLINE void put(char* d, int64_t i, int64_t count, int64_t pixel_stride, __m128i v, __m128i, int16_t) {
  if (i < count) _mm_storeu_si128(reinterpret_cast<__m128i*>(d + i * pixel_stride), v);
}
PC_INLINE void put(char* d, int64_t i, int64_t count, int64_t pixel_stride, __m128i v, __m128i offset, uint8_t) {
  if (i < count) _mm_storel_epi64(reinterpret_cast<__m128i*>(d + i * pixel_stride), _mm_packus_epi16(_mm_add_epi16(v, offset), v));
}

// Up to 8 channels of up to 8 pixels.
template <class Operand, bool kWhole>
PC_INLINE void quantize_block(const Quantizer& q, const float* x, int64_t plane, int64_t channels, int64_t pixels, char* d,
                              int64_t pixel_stride, __m256* bad) {
  const __m256i m = first(pixels);
  const __m256 zero = _mm256_setzero_ps();
  __m256i w[4];  // each 128-bit lane: 4 pixels of 2 channels
  PC_UNROLL
  for (int i = 0; i < 4; ++i) {
    __m256i v[2];
    PC_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float* s = x + (2 * i + j) * plane;
      const __m256 f = kWhole ? _mm256_loadu_ps(s) : 2 * i + j < channels ? _mm256_maskload_ps(s, m) : zero;
      bad[i % 2] = _mm256_fmadd_ps(f, zero, bad[i % 2]);
      v[j] = q.round(f);
    }
    w[i] = _mm256_packs_epi32(v[0], v[1]);
  }
  __m256i lo4[2], hi4[2];  // then 4 channels by pixel pairs, then 8 channels by pixel
  PC_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256i even = _mm256_unpacklo_epi16(w[2 * i], w[2 * i + 1]), odd = _mm256_unpackhi_epi16(w[2 * i], w[2 * i + 1]);
    lo4[i] = _mm256_unpacklo_epi16(even, odd), hi4[i] = _mm256_unpackhi_epi16(even, odd);
  }
  const __m256i out[4] = {_mm256_unpacklo_epi64(lo4[0], lo4[1]), _mm256_unpackhi_epi64(lo4[0], lo4[1]),
                          _mm256_unpacklo_epi64(hi4[0], hi4[1]), _mm256_unpackhi_epi64(hi4[0], hi4[1])};
  const int64_t count = kWhole ? 8 : pixels;
  PC_UNROLL
  for (int j = 0; j < 4; ++j) put(d, j, count, pixel_stride, _mm256_castsi256_si128(out[j]), q.offset, Operand{});
  PC_UNROLL
  for (int j = 0; j < 4; ++j) put(d, 4 + j, count, pixel_stride, _mm256_extracti128_si256(out[j], 1), q.offset, Operand{});
}

template <class Operand>
float quantize_planes(const float* x, int64_t plane, int64_t row, int64_t channels, int64_t rows, int64_t pixels, float inverse,
                      int zero_point, int quant_min, char* dst, int64_t row_stride, int64_t pixel_stride) {
  const Quantizer q(inverse, zero_point, quant_min);
  __m256 bad[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
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
  float lanes[8], sum = 0.0f;
  _mm256_storeu_ps(lanes, _mm256_add_ps(bad[0], bad[1]));
  for (float v : lanes) sum += v;
  return sum;
}

struct I16 {
  __m256i v;
  PC_INLINE I16 operator+(I16 o) const { return {_mm256_add_epi16(v, o.v)}; }
  PC_INLINE I16 operator-(I16 o) const { return {_mm256_sub_epi16(v, o.v)}; }
  template <int n>
  PC_INLINE I16 shl() const {
    return n == 1 ? I16{_mm256_add_epi16(v, v)} : I16{_mm256_slli_epi16(v, n)};
  }
};

// 16 channels from operands on, as q - zero_point.
PC_INLINE __m256i load_operands(const char* p, __m256i, int16_t) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
PC_INLINE __m256i load_operands(const char* p, __m256i offset, uint8_t) {
  return _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), offset);
}

// 16 channels of one tile, from rows of operands to rows of v.
template <class Operand>
PC_INLINE void input_vector(const char* src, int64_t row_stride, int64_t pixel_stride, int16_t* v, int64_t position_stride,
                            __m256i offset) {
  I16 w[6][6];  // w[column][row]: the columns are done, the rows are not
  PC_UNROLL
  for (int x = 0; x < 6; ++x) {
    I16 d[6];
    PC_UNROLL
    for (int y = 0; y < 6; ++y) d[y].v = load_operands(src + y * row_stride + x * pixel_stride, offset, Operand{});
    input_transform(d, w[x], 1);
  }
  PC_UNROLL
  for (int y = 0; y < 6; ++y) {
    I16 d[6], r[6];
    PC_UNROLL
    for (int x = 0; x < 6; ++x) d[x] = w[x][y];
    input_transform(d, r, 1);
    PC_UNROLL
    for (int x = 0; x < 6; ++x) _mm256_storeu_si256(reinterpret_cast<__m256i*>(v + (y * 6 + x) * position_stride), r[x].v);
  }
}

template <class Operand>
void winograd_input(const void* src, int64_t row_stride, int64_t pixel_stride, int64_t channels, int zero_point, int16_t* v,
                    int64_t position_stride) {
  constexpr int64_t kSize = sizeof(Operand);
  const __m256i offset = _mm256_set1_epi16(static_cast<int16_t>(128 + zero_point));
  const char* p = static_cast<const char*>(src);
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) input_vector<Operand>(p + c * kSize, row_stride, pixel_stride, v + c, position_stride, offset);
  if (c == channels) return;
  // The rest through copies: whole vectors would read and write beyond the last pixel and tile.
  const size_t rest = static_cast<size_t>(channels - c);
  alignas(32) char patch[36][32] = {};
  alignas(32) int16_t out[36][16];
  for (int i = 0; i < 36; ++i) std::memcpy(patch[i], p + i / 6 * row_stride + i % 6 * pixel_stride + c * kSize, rest * kSize);
  input_vector<Operand>(patch[0], 6 * 32, 32, out[0], 16, offset);
  for (int i = 0; i < 36; ++i) std::memcpy(v + i * position_stride + c, out[i], rest * 2);
}
