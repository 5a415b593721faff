// Rows of int16 values as signed bytes that vpmaddubsw can take without saturating, plus a list of what was cut off.
//
// Weights are unsigned there (w + 128, up to 255), so a sum of products stays in int16 while the positive values sum up to at most 128 and
// the negative ones to at least -128. Values of a row lie around zero and are scaled by the largest, so sums beyond that are rare: the
// values are cut, and the rest goes to a list of further dwords (four values of k, to be multiplied like the others).
//
// Rows with few negative values (behind a ReLU or a GELU, or with a zero point) have all their large values on one side. They are shifted
// down first, by what pairs or quads of their smallest value allow; `shift` times the column sum makes up for it.
#pragma once
#include <immintrin.h>

#include "core/target.h"

namespace pycompress::int8_matmul {
namespace {

// How a row is stored: int16 values (too many corrections), or bytes that are safe in pairs, or in quads (pairs of neighbouring groups).
enum class Form : int32_t { wide, pairs, quads };

// Behind the 2 * depth bytes of a row. Bytes are followed by corrections: where the weights of four k lie in a panel, int32[corrections],
// and four bytes to multiply them with, int32[corrections].
struct RowHead {
  Form form;
  int32_t corrections;
  int32_t offset;  // 128 * sum of the row: what w + 128 adds, in wrapping int32
  int32_t shift;   // subtracted from every value
  int32_t run;     // so many rows from here on, this one included, are bytes, or are not
};

// For every set of eight dwords: which ones are in it, and how many.
struct Compress {
  uint8_t lanes[256][8], count[256];
  constexpr Compress() : lanes(), count() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0; lane < 8; ++lane)
        if (set >> lane & 1) lanes[set][count[set]++] = static_cast<uint8_t>(lane);
  }
};
constexpr Compress kCompress;

PC_TARGET_BEGIN("avx2,fma,f16c")

// The part of 32 bytes whose sums of two stay in -128 ... 127; what is left is the second one of a pair alone.
PC_INLINE __m256i safe_in_pairs(__m256i v) {
  const __m256i first = _mm256_slli_epi16(v, 8);  // where the second one of a pair is, else 0
  const __m256i positive = _mm256_max_epi8(first, _mm256_setzero_si256()), negative = _mm256_sub_epi8(positive, first);
  const __m256i most = _mm256_subs_epu8(_mm256_set1_epi8(127), positive);
  const __m256i least = _mm256_subs_epu8(_mm256_set1_epi8(static_cast<char>(128)), negative);
  return _mm256_min_epi8(_mm256_max_epi8(v, _mm256_sub_epi8(_mm256_setzero_si256(), least)), most);
}

// Unsigned bytes, cut so that no sum of four passes `top`: differences of running sums that stop there. Pairs 0 and 2 of eight bytes make a
// quad, and so do pairs 1 and 3: those that meet in a lane when two groups of four k are added.
PC_INLINE __m256i cut_quads(__m256i v, __m256i top) {
  const __m256i carry = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, -1, 1, 1, 3, 3, -1, -1, -1, -1, 9, 9, 11, 11));
  const __m256i before = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 0, -1, 2, 1, 4, 3, 6, -1, 8, -1, 10, 9, 12, 11, 14));
  __m256i sum = _mm256_adds_epu8(v, _mm256_slli_epi16(v, 8));
  sum = _mm256_min_epu8(_mm256_adds_epu8(sum, _mm256_shuffle_epi8(sum, carry)), top);
  return _mm256_sub_epi8(sum, _mm256_shuffle_epi8(sum, before));
}

PC_INLINE __m256i safe_in_quads(__m256i v) {
  const __m256i positive = _mm256_max_epi8(v, _mm256_setzero_si256()), negative = _mm256_sub_epi8(positive, v);
  return _mm256_sub_epi8(cut_quads(positive, _mm256_set1_epi8(127)), cut_quads(negative, _mm256_set1_epi8(static_cast<char>(128))));
}

// What `encode` makes of a row. There is room for its bytes, rounded up to 32, and for two corrections per byte and one vector.
struct Encoded {
  int8_t* bytes;
  int32_t *at, *four;
  int64_t corrections;
  int32_t shift, sum;
};

PC_INLINE bool is_zero(__m256i v) { return _mm256_testz_si256(v, v); }

// Appends the dwords that are not zero; they belong to k = i ... i + 31.
PC_INLINE void append(__m256i dwords, int64_t i, Encoded& to) {
  const int set = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(dwords, _mm256_setzero_si256()))) ^ 0xff;
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[set])));
  const __m256i at = _mm256_add_epi32(_mm256_slli_epi32(lanes, 6), _mm256_set1_epi32(static_cast<int32_t>(16 * i)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.at + to.corrections), at);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.four + to.corrections), _mm256_permutevar8x32_epi32(dwords, lanes));
  to.corrections += kCompress.count[set];
}

PC_INLINE void append_all(__m256i rest, int64_t i, Encoded& to) {
  while (!is_zero(rest)) {
    const __m256i part = safe_in_pairs(rest);
    append(part, i, to);
    rest = _mm256_sub_epi8(rest, part);
  }
}

PC_INLINE __m256i to_bytes(__m256i low, __m256i high) { return _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8); }

// The smallest and the largest of `padded` values, a multiple of 32.
struct Bounds {
  int least, largest;
};
PC_INLINE Bounds bounds(const int16_t* q, int64_t padded) {
  __m256i least[2], largest[2];
  for (int v = 0; v < 2; ++v) least[v] = largest[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
  for (int64_t i = 0; i < padded; i += 32)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i + 16 * v));
      least[v] = _mm256_min_epi16(least[v], y), largest[v] = _mm256_max_epi16(largest[v], y);
    }
  const __m256i low = _mm256_min_epi16(least[0], least[1]), high = _mm256_max_epi16(largest[0], largest[1]);
  const __m128i low8 = _mm_min_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i high8 = _mm_max_epi16(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  // vphminposuw orders unsigned values: from -32768 up, or from 32767 down.
  const __m128i up = _mm_set1_epi16(-32768), down = _mm_set1_epi16(32767);
  return {_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(low8, up)), 0) - 32768,
          32767 - _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(high8, down)), 0)};
}

// What to subtract from values within `b` so that few sums are too large. Zero is the most frequent value; `floor` is what can be added up.
PC_INLINE int shift_for(Bounds b, int floor, bool beyond_int8) {
  if (b.least > floor) return b.least - floor;
  return beyond_int8 && b.largest > 127 && b.largest - b.least <= 255 ? b.largest - 127 : 0;
}

alignas(32) constexpr int16_t kInside[64] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                             -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

// k values, -255 ... 255, or, unless `beyond_int8`, what saturates to -128 ... 127 (NaN is -32768); behind them, up to the next multiple
// of 32, zeros. Corrections are too frequent to be predicted, so they are appended without a branch.
template <bool kQuads>
void encode(const int16_t* q, int64_t k, bool beyond_int8, Encoded* result) {
  const __m256i ones = _mm256_set1_epi8(1);
  Encoded to = *result;
  to.corrections = 0;
  const Bounds b = bounds(q, round_up(k, 32));
  to.shift = shift_for(b, kQuads ? -32 : -64, beyond_int8);
  beyond_int8 &= b.largest - to.shift > 127 || b.least - to.shift < -128;
  const __m256i shift = _mm256_set1_epi16(static_cast<int16_t>(to.shift));
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < k; i += 32) {
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i)), shift_low = shift;
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i + 16)), shift_high = shift;
    if (k - i < 32) {  // what lies behind the row stays 0
      const int16_t* inside = kInside + 32 - (k - i);
      shift_low = _mm256_and_si256(shift, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(inside)));
      shift_high = _mm256_and_si256(shift, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(inside + 16)));
    }
    low = _mm256_subs_epi16(low, shift_low), high = _mm256_subs_epi16(high, shift_high);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1)));
    const __m256i v = to_bytes(low, high), safe = kQuads ? safe_in_quads(v) : safe_in_pairs(v), rest = _mm256_sub_epi8(v, safe);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.bytes + i), safe);
    if (kQuads && !_mm256_testz_si256(_mm256_maddubs_epi16(_mm256_abs_epi8(rest), ones), _mm256_set1_epi16(~127)))
      append_all(rest, i, to);
    else
      append(rest, i, to);
    if (!beyond_int8) continue;
    __m256i got = v;
    for (;;) {
      low = _mm256_sub_epi16(low, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(got)));
      high = _mm256_sub_epi16(high, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(got, 1)));
      if (is_zero(_mm256_or_si256(low, high))) break;
      append_all(got = to_bytes(low, high), i, to);
    }
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
  uint32_t total = 0;
  for (uint32_t lane : lanes) total += lane;
  to.sum = static_cast<int32_t>(total);
  *result = to;
}

PC_TARGET_END

}  // namespace
}  // namespace pycompress::int8_matmul
