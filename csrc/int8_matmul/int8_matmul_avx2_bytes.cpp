// AVX2, linear layers: vpmaddubsw on bytes, three instructions for 32 products where int16 (int8_matmul_avx2.cpp) needs four, and as exact:
// rows are cut so that no int16 sum saturates, and what was cut off is multiplied in a second step (avx2_byte_rows.h).
//
// Weights are packed as w + 128; a row's share of that, 128 * sum(q), is subtracted from its sums. Rows that would need too many
// corrections stay int16 and go through the int16 kernel, on panels that are brought into its order.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include <algorithm>

#include "core/activation_simd.h"
#include "core/scratch.h"
#include "int8_matmul/avx2_byte_rows.h"
#include "int8_matmul/fetch.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int8_matmul {

extern const Kernel kAvx2;

namespace {

constexpr int kMr = 6, kNr = 16, kKr = 4;
constexpr int64_t kGroup = kKr * kNr;  // bytes of a panel for four k

RowHead* head(const void* row, int64_t depth) {
  return reinterpret_cast<RowHead*>(const_cast<char*>(static_cast<const char*>(row)) + 2 * depth);
}

PC_TARGET_BEGIN("avx2,fma,f16c")

alignas(32) const int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// By hand, in an order that compilers may not change: they hoist products, run out of registers and spill.
#if defined(__GNUC__)
// c0, c1 += four bytes of a row times four k of 16 columns
PC_INLINE void add_group(__m256i& c0, __m256i& c1, const char* four, __m256i b0, __m256i b1, __m256i ones) {
  __m256i v;
  __asm__ volatile(
      "vpbroadcastd %[four],%[v]\n"
      "vpmaddubsw %[v],%[b0],%[v]\n"
      "vpmaddwd %[ones],%[v],%[v]\n"
      "vpaddd %[v],%[c0],%[c0]\n"
      "vpbroadcastd %[four],%[v]\n"
      "vpmaddubsw %[v],%[b1],%[v]\n"
      "vpmaddwd %[ones],%[v],%[v]\n"
      "vpaddd %[v],%[c1],%[c1]\n"
      : [c0] "+x"(c0), [c1] "+x"(c1), [v] "=&x"(v)
      : [four] "m"(*reinterpret_cast<const char (*)[4]>(four)), [b0] "x"(b0), [b1] "x"(b1), [ones] "x"(ones));
}
// c += eight bytes of a row times eight k of 8 columns
PC_INLINE void add_two_groups(__m256i& c, const char* eight, __m256i b0, __m256i b1) {
  __m256i v, w;
  __asm__ volatile(
      "vpbroadcastd %[four],%[v]\n"
      "vpbroadcastd %[next],%[w]\n"
      "vpmaddubsw %[v],%[b0],%[v]\n"
      "vpmaddubsw %[w],%[b1],%[w]\n"
      "vpaddw %[w],%[v],%[v]\n"
      "vpmaddwd %[ones],%[v],%[v]\n"
      "vpaddd %[v],%[c],%[c]\n"
      : [c] "+x"(c), [v] "=&x"(v), [w] "=&x"(w)
      : [four] "m"(*reinterpret_cast<const char (*)[4]>(eight)), [next] "m"(*reinterpret_cast<const char (*)[4]>(eight + 4)), [b0] "x"(b0),
        [b1] "x"(b1), [ones] "m"(kOnes));
}
#else
PC_INLINE void add_group(__m256i& c0, __m256i& c1, const char* four, __m256i b0, __m256i b1, __m256i ones) {
  const __m256i v = _mm256_set1_epi32(load32(four));
  c0 = _mm256_add_epi32(c0, _mm256_madd_epi16(_mm256_maddubs_epi16(b0, v), ones));
  c1 = _mm256_add_epi32(c1, _mm256_madd_epi16(_mm256_maddubs_epi16(b1, v), ones));
}
PC_INLINE void add_two_groups(__m256i& c, const char* eight, __m256i b0, __m256i b1) {
  const __m256i v = _mm256_maddubs_epi16(b0, _mm256_set1_epi32(load32(eight)));
  const __m256i w = _mm256_maddubs_epi16(b1, _mm256_set1_epi32(load32(eight + 4)));
  c = _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_add_epi16(v, w), _mm256_set1_epi16(1)));
}
#endif

PC_INLINE __m256i load(const int8_t* b) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(b)); }

// R rows times a panel: sums, corrections, and floats out.
template <int R, bool kRelu, bool kQuads>
void linear_rows(const char* a, int64_t stride, int64_t depth, const int8_t* b, Fetch fetch, int used, const float* row_scale,
                 const Epilogue& e, float* out, int64_t ldo) {
  __m256i c[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = _mm256_setzero_si256();
  const char *x = a, *x3 = a + 3 * stride;
  const int8_t* w = b;
  int64_t groups = depth / kKr;
  if (kQuads) {
    for (; groups >= 2; groups -= 2, w += 2 * kGroup, x += 2 * kKr, x3 += 2 * kKr) {
      _mm_prefetch(reinterpret_cast<const char*>(fetch.from), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(fetch.from + fetch.step), _MM_HINT_T0);
      fetch.from += 2 * fetch.step;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m256i b0 = load(w + 32 * v), b1 = load(w + kGroup + 32 * v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) add_two_groups(c[r][v], (r < 3 ? x : x3) + r % 3 * stride, b0, b1);
      }
    }
  }
  const __m256i ones = _mm256_load_si256(reinterpret_cast<const __m256i*>(kOnes));
  for (; groups > 0; --groups, w += kGroup, x += kKr, x3 += kKr) {
    _mm_prefetch(reinterpret_cast<const char*>(fetch.from), _MM_HINT_T0);
    fetch.from += fetch.step;
    const __m256i b0 = load(w), b1 = load(w + 32);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) add_group(c[r][0], c[r][1], (r < 3 ? x : x3) + r % 3 * stride, b0, b1, ones);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const char* row = a + r * stride;
    const RowHead& h = *head(row, depth);
    const int32_t *at = reinterpret_cast<const int32_t*>(row + depth), *four = at + h.corrections;
    for (int32_t i = 0; i < h.corrections; ++i)
      add_group(c[r][0], c[r][1], reinterpret_cast<const char*>(four + i), load(b + at[i]), load(b + at[i] + 32), ones);
  }
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  int32_t shifted = 0;
  for (int r = 0; r < R; ++r) shifted |= head(a + r * stride, depth)->shift;
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(used - 8 * v), lane);
    const __m256 sb = _mm256_maskload_ps(e.col_scale + 8 * v, m);
    const __m256 bias = e.bias ? _mm256_maskload_ps(e.bias + 8 * v, m) : _mm256_setzero_ps();
    if (shifted) {
      const __m256i sums = _mm256_maskload_epi32(e.column_sum + 8 * v, m);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        c[r][v] = _mm256_add_epi32(c[r][v], _mm256_mullo_epi32(sums, _mm256_set1_epi32(head(a + r * stride, depth)->shift)));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(c[r][v], _mm256_set1_epi32(head(a + r * stride, depth)->offset)));
      const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(row_scale[r]), sb);
      const __m256 y = activate_avx2(_mm256_fmadd_ps(sum, scale, bias), kRelu ? Activation::relu : Activation::none);
      if (used >= 8 * v + 8)
        _mm256_storeu_ps(out + r * ldo + 8 * v, y);
      else
        _mm256_maskstore_ps(out + r * ldo + 8 * v, m, y);
    }
  }
}

template <int R>
void linear_tile(const char* a, int64_t stride, int64_t depth, const int8_t* b, Fetch fetch, int used, const float* row_scale,
                 const Epilogue& e, float* out, int64_t ldo) {
  bool quads = true;
  for (int r = 0; r < R; ++r) quads &= head(a + r * stride, depth)->form == Form::quads;
  const bool relu = e.activation == Activation::relu;
  if (quads)
    relu ? linear_rows<R, true, true>(a, stride, depth, b, fetch, used, row_scale, e, out, ldo)
         : linear_rows<R, false, true>(a, stride, depth, b, fetch, used, row_scale, e, out, ldo);
  else
    relu ? linear_rows<R, true, false>(a, stride, depth, b, fetch, used, row_scale, e, out, ldo)
         : linear_rows<R, false, false>(a, stride, depth, b, fetch, used, row_scale, e, out, ldo);
}

// Rows of bytes.
void linear_bytes(const char* a, int64_t stride, int64_t rows, int64_t depth, const int8_t* b, int used, const Epilogue& e, float* out,
                  int64_t ldo) {
  const auto tile = [](int count) {
    constexpr decltype(&linear_tile<1>) kTiles[] = {linear_tile<1>, linear_tile<2>, linear_tile<3>,
                                                    linear_tile<4>, linear_tile<5>, linear_tile<6>};
    return kTiles[count - 1];
  };
  Fetch fetch(b, depth / kKr, kGroup, ceil_div(rows, kMr));
  int count = 0;
  for (int64_t r = 0; r < rows; r += count, fetch.from += depth / kKr * fetch.step) {
    count = next_rows(rows - r);
    tile(count)(a + r * stride, stride, depth, b, fetch, used, e.row_scale + r, e, out + r * ldo, ldo);
  }
}

// Four k of 16 columns as the int16 kernel wants them: two pairs, each of 16 columns, signed.
PC_INLINE void pairs(const int8_t* b, __m256i* first, __m256i* second) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  const __m256i low = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(_mm256_xor_si256(load(b), flip), order), 0xd8);
  const __m256i high = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(_mm256_xor_si256(load(b + 32), flip), order), 0xd8);
  *first = _mm256_permute2x128_si256(low, high, 0x20);
  *second = _mm256_permute2x128_si256(low, high, 0x31);
}

void pair_panel(const int8_t* b, int64_t count, int8_t* to) {
  for (int64_t i = 0; i < count; i += kGroup) {
    __m256i first, second;
    pairs(b + i, &first, &second);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), first);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + i + 32), second);
  }
}

void widen_panel(const int8_t* b, int64_t count, void* wide) {
  __m256i* w = static_cast<__m256i*>(wide);
  for (int64_t i = 0; i < count; i += kGroup, w += 4) {
    __m256i first, second;
    pairs(b + i, &first, &second);
    _mm256_store_si256(w, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(first)));
    _mm256_store_si256(w + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(first, 1)));
    _mm256_store_si256(w + 2, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(second)));
    _mm256_store_si256(w + 3, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(second, 1)));
  }
}

PC_TARGET_END

Encoded scratch_row(int64_t padded) {
  static thread_local Scratch scratch;
  const int64_t most = 2 * padded + 8;  // more than values of -255 ... 255 need
  int32_t* at = scratch.get<int32_t>(static_cast<size_t>(2 * most + padded / 4));
  return {reinterpret_cast<int8_t*>(at + 2 * most), at, at + most, 0, 0, 0};
}

// The form that costs least for rows like these, by a few of them: tenths of a cycle per row and panel, as measured on Golden Cove. The end
// of a list of corrections is rarely predicted.
Form best_form(const char* rows, int64_t stride, int64_t count, int64_t k, bool beyond_int8, Encoded* row) {
  if (count < kMr) return Form::pairs;  // as fast as memory
  int64_t steps = 0, ends = 0, in_pairs = 0, in_quads = 0;
  for (int64_t r = 0; r < count; r += std::max<int64_t>(4, count / 4), steps += ceil_div(k, 8), ++ends) {
    const int16_t* q = reinterpret_cast<const int16_t*>(rows + r * stride);
    encode<false>(q, k, beyond_int8, row);
    in_pairs += row->corrections;
    encode<true>(q, k, beyond_int8, row);
    in_quads += row->corrections;
  }
  const int64_t wide = 56 * steps, as_pairs = 44 * steps + 30 * in_pairs + 150 * ends, as_quads = 36 * steps + 30 * in_quads + 150 * ends;
  return wide < std::min(as_pairs, as_quads) ? Form::wide : as_quads < as_pairs ? Form::quads : Form::pairs;
}

// Leaves the row as it is if the corrections are too many.
void encode_row(char* row, int64_t k, int64_t depth, Form form, bool beyond_int8, Encoded* encoded) {
  const int16_t* q = reinterpret_cast<const int16_t*>(row);
  form == Form::quads ? encode<true>(q, k, beyond_int8, encoded) : encode<false>(q, k, beyond_int8, encoded);
  const int64_t list = encoded->corrections * 4;
  if (2 * list > depth) return;
  std::memcpy(row, encoded->bytes, static_cast<size_t>(depth));
  std::memcpy(row + depth, encoded->at, static_cast<size_t>(list));
  std::memcpy(row + depth + list, encoded->four, static_cast<size_t>(list));
  const uint32_t offset = static_cast<uint32_t>(encoded->sum) * 128u;
  *head(row, depth) = {form, static_cast<int32_t>(encoded->corrections), static_cast<int32_t>(offset), encoded->shift, 0};
}

void encode_rows(void* rows, int64_t stride, int64_t count, int64_t k, bool beyond_int8) {
  const int64_t depth = round_up(k, kKr), padded = round_up(k, 32);
  char* row = static_cast<char*>(rows);
  Encoded encoded = scratch_row(padded);
  for (int64_t r = 0; r < count; ++r) {
    std::memset(row + r * stride + 2 * depth, 0, static_cast<size_t>(2 * (padded - depth)));
    *head(row + r * stride, depth) = {Form::wide, 0, 0, 0, 0};  // zeros: perhaps in the padding
  }
  const Form form = best_form(row, stride, count, k, beyond_int8, &encoded);
  if (form != Form::wide)
    for (int64_t r = 0; r < count; ++r) encode_row(row + r * stride, k, depth, form, beyond_int8, &encoded);
  for (int64_t r = count - 1; r >= 0; --r) {
    RowHead& h = *head(row + r * stride, depth);
    const RowHead* next = r + 1 < count ? head(row + (r + 1) * stride, depth) : nullptr;
    h.run = next && (next->form == Form::wide) == (h.form == Form::wide) ? next->run + 1 : 1;
  }
}

void linear(const void* a, int64_t stride, int64_t rows, int64_t depth, const int8_t* b, int used, const Epilogue& e, float* out,
            int64_t ldo) {
  static thread_local Scratch scratch;
  const char* row = static_cast<const char*>(a);
  int8_t* paired = nullptr;
  for (int64_t r = 0, run = 0; r < rows; r += run, row += run * stride, out += run * ldo) {
    run = std::min<int64_t>(head(row, depth)->run, rows - r);
    Epilogue own = e;
    own.row_scale += r, own.row_correction += r;
    if (head(row, depth)->form != Form::wide) {
      linear_bytes(row, stride, run, depth, b, used, own, out, ldo);
      continue;
    }
    if (!paired) {
      paired = scratch.get<int8_t>(static_cast<size_t>(depth * kNr));
      pair_panel(b, depth * kNr, paired);
    }
    kAvx2.linear(row, stride, run, depth, paired, used, own, out, ldo);
  }
}

void tile(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, int cols, int32_t* acc) {
  static thread_local Scratch scratch;
  void* wide = scratch.get(static_cast<size_t>(segments * depth * kNr * 2));
  widen_panel(b, segments * depth * kNr, wide);
  kAvx2.tile_wide(a, rows, segments, depth, wide, cols, acc);
}

// The int16 kernel's.
float amax(const float* x, int64_t k) { return kAvx2.amax(x, k); }
void range(const float* x, int64_t k, float* low, float* high) { kAvx2.range(x, k, low, high); }
void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, int zero_point, int quant_min, void* dst) {
  kAvx2.quantize_row(x, k, kp, inverse, zero_point, quant_min, dst);
}
void load_row(const int8_t* a, int64_t k, int64_t kp, int zero_point, void* dst) { kAvx2.load_row(a, k, kp, zero_point, dst); }
void widen(const void* src, DType dtype, int64_t n, float* dst) { kAvx2.widen(src, dtype, n, dst); }
void narrow(const float* src, int64_t n, DType dtype, void* dst) { kAvx2.narrow(src, n, dtype, dst); }
void tile_wide(const void* const* a, int rows, int segments, int64_t depth, const void* wide, int cols, int32_t* acc) {
  kAvx2.tile_wide(a, rows, segments, depth, wide, cols, acc);
}
void store_f32(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  kAvx2.store_f32(acc, rows, cols, e, out, ldo);
}
void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, void* dst, int64_t stride, float* scales) {
  kAvx2.quantize_rows(x, ldx, rows, k, kp, dst, stride, scales);
}
void activate(float* y, int64_t rows, int cols, int64_t ld, Activation activation) { kAvx2.activate(y, rows, cols, ld, activation); }

}  // namespace

extern const Kernel kAvx2Bytes;
const Kernel kAvx2Bytes = {"avx2",   Isa::avx2,       kMr,  kNr,         16,     kKr,         2,         amax,  range,  quantize_row,
                           load_row, widen,           tile, store_f32,   narrow, widen_panel, tile_wide, false, linear, quantize_rows,
                           activate, sizeof(RowHead), 0x80, encode_rows, &kAvx2};

}  // namespace pycompress::int8_matmul
#endif
