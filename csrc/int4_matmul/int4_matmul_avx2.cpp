// AVX2. int8 activations: vpmaddubsw of u (0..15) with q, eight of them added as int16 before one vpmaddwd; a lane holds at most
// 16 * 15 * 128 = 30720, so nothing saturates. Float activations: nibbles are converted where they lie in the dword (see kShift).
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/activation_simd.h"
#include "core/float_rows.h"
#include "int4_matmul/int4_matmul.h"

namespace pycompress::int8_matmul {
extern const Kernel kAvx2;
}

namespace pycompress::int4_matmul {
namespace {

constexpr int kMr = 6;  // 6 x 16: 12 accumulators, 2 vectors of weights, 1 broadcast, 1 product: all 16 registers
constexpr int kWide = kMaxGroup / 4 * 64;

PC_TARGET_BEGIN("avx2,fma")

PC_INLINE __m256i quantize8(__m256 x, __m256 inverse) {
  // max/min return the second operand for NaN, so NaN ends as -127.
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, inverse), _mm256_set1_ps(-127.0f)), _mm256_set1_ps(127.0f)));
}

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, int8_t* q) {
  const __m256 inv = _mm256_set1_ps(inverse);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    const __m256i a = _mm256_packs_epi32(quantize8(_mm256_loadu_ps(x + i), inv), quantize8(_mm256_loadu_ps(x + i + 8), inv));
    const __m256i b = _mm256_packs_epi32(quantize8(_mm256_loadu_ps(x + i + 16), inv), quantize8(_mm256_loadu_ps(x + i + 24), inv));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
  }
  for (; i < k; ++i) q[i] = static_cast<int8_t>(_mm256_extract_epi32(quantize8(_mm256_set1_ps(x[i]), inv), 0));
  for (; i < kp; ++i) q[i] = 0;
}

// Nibbles of 16 columns to bytes: [depth / 4][16 columns][4 k]; columns that do not exist become 0.
PC_INLINE void unpack(const uint32_t* weight, int64_t depth, int cols, bool both, uint8_t* wide) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i* w = reinterpret_cast<__m256i*>(wide);
  for (int64_t i = 0; i < depth / 8; ++i, w += 4, weight += cols) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
    const __m256i b = both ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + 8)) : _mm256_setzero_si256();
    _mm256_store_si256(w, _mm256_and_si256(a, mask));
    _mm256_store_si256(w + 1, _mm256_and_si256(b, mask));
    _mm256_store_si256(w + 2, _mm256_and_si256(_mm256_srli_epi32(a, 4), mask));
    _mm256_store_si256(w + 3, _mm256_and_si256(_mm256_srli_epi32(b, 4), mask));
  }
}

#if defined(__GNUC__) && defined(__x86_64__)
// By hand: compilers hoist the products, run out of registers and spill accumulators.
#define PC_WEIGHTS(q)   \
  "vmovdqa " #q         \
  "*64(%[b]),%%ymm12\n" \
  "vmovdqa " #q "*64+32(%[b]),%%ymm13\n"
#define PC_FIRST(at, c0, c1)             \
  "vpbroadcastd (%[" at                  \
  "),%%ymm14\n"                          \
  "vpmaddubsw %%ymm14,%%ymm12,%%ymm" #c0 \
  "\n"                                   \
  "vpmaddubsw %%ymm14,%%ymm13,%%ymm" #c1 "\n"
#define PC_NEXT(q, at, c0, c1)            \
  "vpbroadcastd " #q "*4(%[" at           \
  "),%%ymm14\n"                           \
  "vpmaddubsw %%ymm14,%%ymm12,%%ymm15\n"  \
  "vpmaddubsw %%ymm14,%%ymm13,%%ymm14\n"  \
  "vpaddw %%ymm15,%%ymm" #c0 ",%%ymm" #c0 \
  "\n"                                    \
  "vpaddw %%ymm14,%%ymm" #c1 ",%%ymm" #c1 "\n"
#define PC_QUAD(q)                                                                                                                    \
  PC_WEIGHTS(q)                                                                                                                       \
  PC_NEXT(q, "a]", 0, 1) PC_NEXT(q, "a],%[l]", 2, 3) PC_NEXT(q, "a],%[l],2", 4, 5) PC_NEXT(q, "d]", 6, 7) PC_NEXT(q, "d],%[l]", 8, 9) \
      PC_NEXT(q, "d],%[l],2", 10, 11)
#define PC_STORE(r, c0, c1)                 \
  "vpmaddwd %%ymm12,%%ymm" #c0 ",%%ymm" #c0 \
  "\n"                                      \
  "vpmaddwd %%ymm12,%%ymm" #c1 ",%%ymm" #c1 \
  "\n"                                      \
  "vmovdqa %%ymm" #c0 "," #r                \
  "*64(%[part])\n"                          \
  "vmovdqa %%ymm" #c1 "," #r "*64+32(%[part])\n"

// part[6][16] = six rows of q times 32 k of 16 columns.
PC_INLINE void chunk6(const int8_t* q, int64_t stride, const uint8_t* wide, int32_t* part) {
  const int8_t* d = q + 3 * stride;
  __asm__ volatile(PC_WEIGHTS(0) PC_FIRST("a]", 0, 1) PC_FIRST("a],%[l]", 2, 3) PC_FIRST("a],%[l],2", 4, 5) PC_FIRST("d]", 6, 7)
                       PC_FIRST("d],%[l]", 8, 9) PC_FIRST("d],%[l],2", 10, 11)
                           PC_QUAD(1) PC_QUAD(2) PC_QUAD(3) PC_QUAD(4) PC_QUAD(5) PC_QUAD(6) PC_QUAD(7)
                   "vpcmpeqw %%ymm12,%%ymm12,%%ymm12\n"
                   "vpsrlw $15,%%ymm12,%%ymm12\n"  // ones
                   PC_STORE(0, 0, 1) PC_STORE(1, 2, 3) PC_STORE(2, 4, 5) PC_STORE(3, 6, 7) PC_STORE(4, 8, 9) PC_STORE(5, 10, 11)
                   :
                   : [a] "r"(q), [d] "r"(d), [l] "r"(stride), [b] "r"(wide), [part] "r"(part)
                   : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
                     "xmm13", "xmm14", "xmm15");
}
#undef PC_WEIGHTS
#undef PC_FIRST
#undef PC_NEXT
#undef PC_QUAD
#undef PC_STORE
#define PC_HAVE_CHUNK6 1
#else
#define PC_HAVE_CHUNK6 0
#endif

// The same with intrinsics: any number of rows, other compilers.
template <int R>
PC_INLINE void chunk(const int8_t* q, int64_t stride, const uint8_t* wide, int32_t* part) {
  const __m256i* w = reinterpret_cast<const __m256i*>(wide);
  __m256i c[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = _mm256_setzero_si256();
  for (int i = 0; i < kChunk / 4; ++i, w += 2) {
    const __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, q + r * stride + 4 * i, 4);
      const __m256i v = _mm256_set1_epi32(four);
      c[r][0] = _mm256_add_epi16(c[r][0], _mm256_maddubs_epi16(w0, v));
      c[r][1] = _mm256_add_epi16(c[r][1], _mm256_maddubs_epi16(w1, v));
    }
  }
  const __m256i one = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) _mm256_store_si256(reinterpret_cast<__m256i*>(part + r * 16 + 8 * v), _mm256_madd_epi16(c[r][v], one));
}

PC_INLINE __m256i zeros(const uint8_t* zero, int c) {
  return zero ? _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero + c))) : _mm256_set1_epi32(8);
}

template <int R>
PC_INLINE void rows_int8(const Group& g, const int8_t* q, int64_t row, const uint8_t* wide, int column, int vectors) {
  alignas(32) int32_t part[kMaxGroup / kChunk][R * 16];
  const int64_t chunks = g.depth / kChunk;
  for (int64_t i = 0; i < chunks; ++i) {
#if PC_HAVE_CHUNK6
    if (R == 6)
      chunk6(q + i * kChunk, g.row_stride, wide + i * kChunk * 16, part[i]);
    else
#endif
      chunk<R>(q + i * kChunk, g.row_stride, wide + i * kChunk * 16, part[i]);
  }
  for (int v = 0; v < vectors; ++v) {
    const __m256 scale = _mm256_loadu_ps(g.scale + column + 8 * v);
    const __m256i zero = zeros(g.zero, column + 8 * v);
    const char* sums = static_cast<const char*>(g.sums) + row * g.sum_stride;
    float* acc = g.acc + row * kNr + column + 8 * v;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, sums += g.sum_stride, acc += kNr) {
      __m256i total = _mm256_load_si256(reinterpret_cast<const __m256i*>(part[0] + r * 16 + 8 * v));
      for (int64_t i = 1; i < chunks; ++i)
        total = _mm256_add_epi32(total, _mm256_load_si256(reinterpret_cast<const __m256i*>(part[i] + r * 16 + 8 * v)));
      // The sum of q fits int16, the upper half of zero's lanes is 0: vpmaddwd is a product that is cheaper than vpmulld.
      const __m256i sum = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(sums));
      total = _mm256_sub_epi32(total, _mm256_madd_epi16(sum, zero));
      _mm256_store_ps(acc, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, _mm256_load_ps(acc)));
    }
  }
}

void group_int8(const Group& g) {
  alignas(32) uint8_t wide[kWide];
  for (int column = 0; column < g.cols; column += 16) {
    const int vectors = g.cols - column >= 16 ? 2 : 1;
    unpack(g.weight + column, g.depth, g.cols, vectors == 2, wide);
    const int8_t* q = static_cast<const int8_t*>(g.rows);
    int64_t r = 0;
    for (; r + kMr <= g.count; r += kMr) rows_int8<kMr>(g, q + r * g.row_stride, r, wide, column, vectors);
    q += r * g.row_stride;
    switch (g.count - r) {
      case 1:
        rows_int8<1>(g, q, r, wide, column, vectors);
        break;
      case 2:
        rows_int8<2>(g, q, r, wide, column, vectors);
        break;
      case 3:
        rows_int8<3>(g, q, r, wide, column, vectors);
        break;
      case 4:
        rows_int8<4>(g, q, r, wide, column, vectors);
        break;
      case 5:
        rows_int8<5>(g, q, r, wide, column, vectors);
        break;
    }
  }
}

// One nibble of 8 columns as u * 2^kShift.
template <int kI>
PC_INLINE __m256 nibble(const uint32_t* weight) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
  return _mm256_cvtepi32_ps(kI == 7 ? _mm256_srli_epi32(w, 28) : _mm256_and_si256(w, _mm256_set1_epi32(15 << kShift[kI])));
}

template <int R, int V, int kI>
PC_INLINE void step(const uint32_t* weight, const float* const* x, int64_t i, __m256 (&c)[R][V]) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const __m256 w = nibble<kI>(weight + 8 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) c[r][v] = _mm256_fmadd_ps(_mm256_broadcast_ss(x[r] + i + kI), w, c[r][v]);
  }
}

template <int R, int V>
PC_INLINE void rows_float(const Group& g, int64_t row, int column) {
  __m256 c[R][V];
  const float* x[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    x[r] = reinterpret_cast<const float*>(static_cast<const char*>(g.rows) + (row + r) * g.row_stride);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) c[r][v] = _mm256_setzero_ps();
  }
  const uint32_t* weight = g.weight + column;
  for (int64_t i = 0; i < g.depth; i += 8, weight += g.cols) {
    step<R, V, 0>(weight, x, i, c);
    step<R, V, 1>(weight, x, i, c);
    step<R, V, 2>(weight, x, i, c);
    step<R, V, 3>(weight, x, i, c);
    step<R, V, 4>(weight, x, i, c);
    step<R, V, 5>(weight, x, i, c);
    step<R, V, 6>(weight, x, i, c);
    step<R, V, 7>(weight, x, i, c);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const __m256 scale = _mm256_loadu_ps(g.scale + column + 8 * v), zero = _mm256_cvtepi32_ps(zeros(g.zero, column + 8 * v));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 sum = _mm256_broadcast_ss(reinterpret_cast<const float*>(static_cast<const char*>(g.sums) + (row + r) * g.sum_stride));
      float* acc = g.acc + (row + r) * kNr + column + 8 * v;
      _mm256_store_ps(acc, _mm256_fmadd_ps(_mm256_fnmadd_ps(zero, sum, c[r][v]), scale, _mm256_load_ps(acc)));
    }
  }
}

template <int R>
PC_INLINE void panel_float(const Group& g, int64_t row) {
  int column = 0;
  if (R == 1)
    for (; column + 64 <= g.cols; column += 64) rows_float<R, R == 1 ? 8 : 1>(g, row, column);  // 8 chains of fma hide their latency
  for (; column + 16 <= g.cols; column += 16) rows_float<R, 2>(g, row, column);
  for (; column < g.cols; column += 8) rows_float<R, 1>(g, row, column);
}

void group_float(const Group& g) {
  int64_t r = 0;
  for (; r + kMr <= g.count; r += kMr) panel_float<kMr>(g, r);
  switch (g.count - r) {
    case 1:
      return panel_float<1>(g, r);
    case 2:
      return panel_float<2>(g, r);
    case 3:
      return panel_float<3>(g, r);
    case 4:
      return panel_float<4>(g, r);
    case 5:
      return panel_float<5>(g, r);
  }
}

template <Activation kActivation>
PC_INLINE void store_rows(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int c = 0; c < cols; c += 8) {
    const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(cols - c), lane);
    const __m256 bias = e.bias ? _mm256_maskload_ps(e.bias + c, m) : _mm256_setzero_ps();
    for (int64_t r = 0; r < rows; ++r) {
      const __m256 y = _mm256_fmadd_ps(_mm256_load_ps(acc + r * kNr + c), _mm256_set1_ps(e.row_scale[r]), bias);
      if (cols - c >= 8)
        _mm256_storeu_ps(out + r * ldo + c, activate_avx2(y, kActivation));
      else
        _mm256_maskstore_ps(out + r * ldo + c, m, activate_avx2(y, kActivation));
    }
  }
}

void store(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  switch (e.activation) {
    case Activation::none:
      return store_rows<Activation::none>(acc, rows, cols, e, out, ldo);
    case Activation::relu:
      return store_rows<Activation::relu>(acc, rows, cols, e, out, ldo);
    case Activation::gelu:
      return store_rows<Activation::gelu>(acc, rows, cols, e, out, ldo);
    case Activation::silu:
      return store_rows<Activation::silu>(acc, rows, cols, e, out, ldo);
  }
}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2", Isa::avx2, 8, &int8_matmul::kAvx2, quantize_row, group_int8, group_float, store};

}  // namespace pycompress::int4_matmul
#endif
