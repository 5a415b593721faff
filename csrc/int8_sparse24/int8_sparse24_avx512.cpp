// AVX-512 VNNI: a byte permutation picks the activations (u8, q + 128) that meet 64 kept weights, one vpdpbusd multiplies and adds.
//
// A vector holds 16 outputs x 4 kept values, one step of 8 k (2:4) or 16 k (1:4). Two records that differ in the permutation:
// - avx512_vbmi: vpermb out of a window of 64 k, a plain 64-byte load per row. Permutation and product have two pipes each, one of them
//   shared: on Zen 4 they take 1.33 cycles together, 96 dense-equivalent MAC per cycle, 192 for 1:4, where the dense kernel's bound is 64;
//   on Zen 5 half of that, 192 and 384 against 128.
// - avx512_vnni: vpshufb out of a window of 16 k, broadcast to the four lanes. On Zen 4 the broadcast costs a shuffle (68 MAC per
//   cycle), on Intel it is a plain load; there it serves Cascade Lake and Cooper Lake.
// The offset of 128 leaves 128 * (sum of values) in every sum; the epilogue takes it away. vpdpbusd wraps and never saturates.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/activation_simd.h"
#include "core/float_rows.h"
#include "int8_sparse24/int8_sparse24.h"

namespace pycompress::int8_sparse24 {
namespace {

// 16 x 16: 16 accumulators, 2 controls, 2 vectors of values, windows and up to 9 constants: 32 registers. Tall rather than wide,
// because expanding the indices (3 instructions per 64 values) then costs 1/16 of a row.
constexpr int kMr = 16, kNr = 16;

int32_t offset(int8_t value) { return 128 * value; }  // operands are q + 128

PC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")

PC_INLINE __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }

float amax(const float* x, int64_t k) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i best = _mm512_setzero_si512(), best1 = best;
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    best = _mm512_max_epu32(best, _mm512_and_si512(mask, _mm512_loadu_si512(x + i)));
    best1 = _mm512_max_epu32(best1, _mm512_and_si512(mask, _mm512_loadu_si512(x + i + 16)));
  }
  for (; i < k; i += 16) best = _mm512_max_epu32(best, _mm512_and_si512(mask, _mm512_maskz_loadu_epi32(first(k - i), x + i)));
  const uint32_t top = _mm512_reduce_max_epu32(_mm512_max_epu32(best, best1));
  float f;
  std::memcpy(&f, &top, 4);
  return f;
}

// 16 values as integers in -127..127, NaN as -127.
PC_INLINE __m512i quantize16(__m512 x, __m512 inverse) {
  const __m512 y = _mm512_max_ps(_mm512_mul_ps(x, inverse), _mm512_set1_ps(-127.0f));
  return _mm512_cvtps_epi32(_mm512_min_ps(y, _mm512_set1_ps(127.0f)));
}

template <int Window>
void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, uint8_t* dst, int64_t stride) {
  const __m512 inv = _mm512_set1_ps(inverse);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // undoes the lanes of the packs
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    const __m512i low = _mm512_packs_epi32(quantize16(_mm512_loadu_ps(x + i), inv), quantize16(_mm512_loadu_ps(x + i + 16), inv));
    const __m512i high = _mm512_packs_epi32(quantize16(_mm512_loadu_ps(x + i + 32), inv), quantize16(_mm512_loadu_ps(x + i + 48), inv));
    const __m512i q = _mm512_xor_si512(_mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)), _mm512_set1_epi8(-128));
    if constexpr (Window == 64) {
      _mm512_storeu_si512(dst, q);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm512_castsi512_si128(q));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + stride), _mm512_extracti32x4_epi32(q, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2 * stride), _mm512_extracti32x4_epi32(q, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 3 * stride), _mm512_extracti32x4_epi32(q, 3));
    }
    dst += 64 / Window * stride;
  }
  for (int64_t start = i; i < kp; i += 16) {
    const __m512i q = _mm512_add_epi32(quantize16(_mm512_maskz_loadu_ps(first(k - i), x + i), inv), _mm512_set1_epi32(128));
    const int64_t at = i - start;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + at / Window * stride + at % Window), _mm512_cvtepi32_epi8(q));
  }
}

// First positions of the groups of the four values of a step inside its window: step s of 2:4 and of 1:4.
alignas(64) constexpr uint32_t kBase[2][8] = {
    {0x04040000, 0x0c0c0808, 0x14141010, 0x1c1c1818, 0x24242020, 0x2c2c2828, 0x34343030, 0x3c3c3838},
    {0x0c080400, 0x1c181410, 0x2c282420, 0x3c383430},
};

// The inner loop in fixed order. Compilers hoist the loads of all windows and the constants, run out of registers and keep sums on the
// stack; and Zen 5 gives each instruction its pipe in program order: permutations and products in turn meet in the same pipe more often
// (in the same tile about 165 MAC per cycle, against 171) than four and four. `base` comes from memory as it is used: no register, no pipe.
// Under AddressSanitizer the intrinsics run, whose loads it sees.
#if defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
PC_INLINE __m512i load(const void* p) {
  __m512i v;
  __asm__ volatile("vmovdqu64 %1, %0" : "=v"(v) : "m"(*static_cast<const __m512i_u*>(p)));
  return v;
}
PC_INLINE __m512i control(__m512i indices, __m512i three, const uint32_t* base) {  // indices & 3 | base
  __asm__ volatile("vpternlogd $0xea, %2%{1to16%}, %1, %0" : "+v"(indices) : "v"(three), "m"(*base));
  return indices;
}
PC_INLINE __m512i permute(const uint8_t* window, __m512i control) {
  __m512i x;
  __asm__ volatile("vpermb %1, %2, %0" : "=v"(x) : "m"(*reinterpret_cast<const __m512i_u*>(window)), "v"(control));
  return x;
}
PC_INLINE __m512i broadcast(const uint8_t* window) {
  __m512i x;
  __asm__ volatile("vbroadcasti32x4 %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const __m128i_u*>(window)));
  return x;
}
PC_INLINE __m512i shuffle(__m512i window, __m512i control) {
  __m512i x;
  __asm__ volatile("vpshufb %2, %1, %0" : "=v"(x) : "v"(window), "v"(control));
  return x;
}
PC_INLINE void dot(__m512i& sum, __m512i x, __m512i values) { __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(values)); }
#else
PC_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }
PC_INLINE __m512i control(__m512i indices, __m512i three, const uint32_t* base) {
  return _mm512_ternarylogic_epi32(indices, three, _mm512_set1_epi32(static_cast<int>(*base)), 0xea);
}
PC_INLINE __m512i permute(const uint8_t* window, __m512i control) { return _mm512_permutexvar_epi8(control, _mm512_loadu_si512(window)); }
PC_INLINE __m512i broadcast(const uint8_t* window) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(window)));
}
PC_INLINE __m512i shuffle(__m512i window, __m512i control) { return _mm512_shuffle_epi8(window, control); }
PC_INLINE void dot(__m512i& sum, __m512i x, __m512i values) { sum = _mm512_dpbusd_epi32(sum, x, values); }
#endif

// One block: `first_step` is its first step inside the window.
template <bool Vbmi, int Kept, int R, int C>
PC_INLINE void block(__m512i (&c)[R][C], const uint8_t* a, const uint8_t* panel, int first_step, __m512i three, int64_t ahead) {
  constexpr int kWindowBytes = Vbmi ? 64 : 16;
#if defined(__GNUC__)
  __asm__("" : "+r"(a), "+r"(panel));  // GCC would carry a pointer per row through the loop, on the stack
#endif
  const __m512i indices = load(panel + 16 * kNr);
  if (ahead) prefetch_block(panel + ahead, kNr);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    // Without VBMI two steps of 2:4 share a window of 16 k, and a step of 1:4 has one of its own.
    const int step = Vbmi ? first_step + 2 * h : 0, second = !Vbmi && Kept == 1 ? step : step + 1;
    const uint8_t* window[2] = {Vbmi ? a : a + h * (2 / Kept) * R * 16, nullptr};
    window[1] = !Vbmi && Kept == 1 ? window[0] + R * 16 : window[0];
    const __m512i from[2] = {control(h ? _mm512_srli_epi32(indices, 4) : indices, three, &kBase[Kept == 1][step]),
                             control(_mm512_srli_epi32(indices, 4 * h + 2), three, &kBase[Kept == 1][second])};
    const __m512i values[2] = {load(panel + 128 * h), load(panel + 128 * h + 64)};
    __m512i x[2 * R], wide = values[0];  // row r, step s: x[2 r + s]; no more than eight at a time
#pragma GCC unroll 9
    for (int i = -4; i < 2 * R; i += 4) {
#pragma GCC unroll 4
      for (int j = i + 4; j < i + 8; ++j)
        if (j < 2 * R) {
          const uint8_t* from_row = window[j % 2] + j / 2 * kWindowBytes;
          if constexpr (Vbmi) {
            x[j] = permute(from_row, from[j % 2]);
          } else {
            if (Kept == 1 || j % 2 == 0) wide = broadcast(from_row);
            x[j] = shuffle(wide, from[j % 2]);
          }
        }
#pragma GCC unroll 4
      for (int j = i; j < i + 4; ++j)
        if (j >= 0 && j < 2 * R) dot(c[j / 2][(2 * h + j % 2) % C], x[j], values[j % 2]);
    }
  }
}

template <bool Vbmi, int Kept, int R>
void tile_rows(const uint8_t* a, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  constexpr int C = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // chains per row: few rows would wait for vpdpbusd's latency
  __m512i c[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) c[r][i] = _mm512_setzero_si512();
  const __m512i three = _mm512_set1_epi8(3);
  int64_t b = 0;
  if constexpr (Vbmi && Kept == 2) {  // two blocks share a window
    for (; b + 2 <= blocks; b += 2, panel += 2 * block_bytes(kNr), a += R * 64) {
      block<Vbmi, Kept, R, C>(c, a, panel, 0, three, ahead);
      block<Vbmi, Kept, R, C>(c, a, panel + block_bytes(kNr), 4, three, ahead);
    }
    if (b < blocks) block<Vbmi, Kept, R, C>(c, a, panel, 0, three, ahead);
  } else {
    for (; b < blocks; ++b, panel += block_bytes(kNr), a += block_depth(Kept) * R) block<Vbmi, Kept, R, C>(c, a, panel, 0, three, ahead);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 1; i < C; ++i) c[r][0] = _mm512_add_epi32(c[r][0], c[r][i]);
    _mm512_storeu_si512(acc + r * kNr, c[r][0]);
  }
}

template <bool Vbmi, int Kept>
void tile(const uint8_t* a, int rows, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc) {
  using Fn = void (*)(const uint8_t*, const uint8_t*, int64_t, int64_t, int32_t*);
  static constexpr Fn table[kMr] = {
      tile_rows<Vbmi, Kept, 1>,  tile_rows<Vbmi, Kept, 2>,  tile_rows<Vbmi, Kept, 3>,  tile_rows<Vbmi, Kept, 4>,
      tile_rows<Vbmi, Kept, 5>,  tile_rows<Vbmi, Kept, 6>,  tile_rows<Vbmi, Kept, 7>,  tile_rows<Vbmi, Kept, 8>,
      tile_rows<Vbmi, Kept, 9>,  tile_rows<Vbmi, Kept, 10>, tile_rows<Vbmi, Kept, 11>, tile_rows<Vbmi, Kept, 12>,
      tile_rows<Vbmi, Kept, 13>, tile_rows<Vbmi, Kept, 14>, tile_rows<Vbmi, Kept, 15>, tile_rows<Vbmi, Kept, 16>};
  table[rows - 1](a, panel, blocks, ahead, acc);
}

template <bool Plain>  // a full panel without activation: the stores need no mask
PC_INLINE void store_rows(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  const __mmask16 m = first(cols);
  const __m512 sb = _mm512_maskz_loadu_ps(m, e.col_scale);
  const __m512 bias = e.bias ? _mm512_maskz_loadu_ps(m, e.bias) : _mm512_setzero_ps();
  const __m512i offsets = _mm512_loadu_si512(e.offsets);
  for (int r = 0; r < rows; ++r, acc += kNr, out += ldo) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(acc), offsets));
    const __m512 y = _mm512_fmadd_ps(sum, _mm512_mul_ps(_mm512_set1_ps(e.row_scale[r]), sb), bias);
    Plain ? _mm512_storeu_ps(out, y) : _mm512_mask_storeu_ps(out, m, activate_avx512(y, e.activation));
  }
}

void store_f32(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  e.activation == Activation::none&& cols == kNr ? store_rows<true>(acc, rows, cols, e, out, ldo)
                                                 : store_rows<false>(acc, rows, cols, e, out, ldo);
}

void widen(const void* src, DType dtype, int64_t n, float* dst) {
  const uint16_t* s = static_cast<const uint16_t*>(src);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = first(n - i);
    const __m256i h = _mm256_maskz_loadu_epi16(m, s + i);
    const __m512 f = dtype == DType::bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)) : _mm512_cvtph_ps(h);
    _mm512_mask_storeu_ps(dst + i, m, f);
  }
}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx512Vbmi, kAvx512Vnni;
const Kernel kAvx512Vbmi = {"avx512_vbmi",
                            Isa::avx512_vbmi,
                            kMr,
                            kNr,
                            amax,
                            widen,
                            narrow_row,
                            store_f32,
                            {64, 64, offset, quantize_row<64>, tile<true, 2>, nullptr, nullptr, 0},
                            {64, 64, offset, quantize_row<64>, tile<true, 1>, nullptr, nullptr, 0}};
const Kernel kAvx512Vnni = {"avx512_vnni",
                            Isa::avx512_vnni,
                            kMr,
                            kNr,
                            amax,
                            widen,
                            narrow_row,
                            store_f32,
                            {16, 16, offset, quantize_row<16>, tile<false, 2>, nullptr, nullptr, 0},
                            {16, 16, offset, quantize_row<16>, tile<false, 1>, nullptr, nullptr, 0}};

}  // namespace pycompress::int8_sparse24
#endif
