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

PC_TARGET_BEGIN("avx2,fma")

#include "int4_matmul/ymm_int8.h"  // NOLINT: inside the region on purpose

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

// The inner steps, in an order that compilers may not change: they hoist broadcasts and products, run out of registers and spill.
#if defined(__GNUC__)

// c0 += four bytes at q times w0, c1 += ... times w1, as int16 pairs.
PC_INLINE void multiply_add(__m256i& c0, __m256i& c1, const int8_t* q, __m256i w0, __m256i w1) {
  __m256i four, product;
  __asm__ volatile(
      "vpbroadcastd %[q],%[four]\n"
      "vpmaddubsw %[four],%[w0],%[product]\n"
      "vpmaddubsw %[four],%[w1],%[four]\n"
      "vpaddw %[product],%[c0],%[c0]\n"
      "vpaddw %[four],%[c1],%[c1]\n"
      : [c0] "+x"(c0), [c1] "+x"(c1), [four] "=&x"(four), [product] "=&x"(product)
      : [q] "m"(*reinterpret_cast<const int32_t*>(q)), [w0] "x"(w0), [w1] "x"(w1));
}

// One nibble of 8 columns as u * 2^kShift.
template <int kI>
PC_INLINE __m256 nibble(const uint32_t* weight, __m256i mask) {
  __m256 w;
  const __m256i& from = *reinterpret_cast<const __m256i*>(weight);
  if (kI == 7)
    __asm__ volatile("vmovdqu %[from],%[w]\nvpsrld $28,%[w],%[w]\nvcvtdq2ps %[w],%[w]" : [w] "=x"(w) : [from] "m"(from));
  else
    __asm__ volatile("vpand %[from],%[mask],%[w]\nvcvtdq2ps %[w],%[w]" : [w] "=x"(w) : [from] "m"(from), [mask] "x"(mask));
  return w;
}

template <int V>
PC_INLINE void fma_rows(__m256 (&c)[V], const float* x, const __m256 (&w)[V]) {
  __m256 v;
  if (V == 2)
    __asm__ volatile("vbroadcastss %[x],%[v]\nvfmadd231ps %[v],%[w0],%[c0]\nvfmadd231ps %[v],%[w1],%[c1]"
                     : [c0] "+x"(c[0]), [c1] "+x"(c[V - 1]), [v] "=&x"(v)
                     : [x] "m"(*x), [w0] "x"(w[0]), [w1] "x"(w[V - 1]));
  else
    __asm__ volatile("vbroadcastss %[x],%[v]\nvfmadd231ps %[v],%[w0],%[c0]" : [c0] "+x"(c[0]), [v] "=&x"(v) : [x] "m"(*x), [w0] "x"(w[0]));
}

#else

PC_INLINE void multiply_add(__m256i& c0, __m256i& c1, const int8_t* q, __m256i w0, __m256i w1) {
  int32_t four;
  std::memcpy(&four, q, 4);
  const __m256i v = _mm256_set1_epi32(four);
  c0 = _mm256_add_epi16(c0, _mm256_maddubs_epi16(w0, v));
  c1 = _mm256_add_epi16(c1, _mm256_maddubs_epi16(w1, v));
}

template <int kI>
PC_INLINE __m256 nibble(const uint32_t* weight, __m256i mask) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
  return _mm256_cvtepi32_ps(kI == 7 ? _mm256_srli_epi32(w, 28) : _mm256_and_si256(w, mask));
}

template <int V>
PC_INLINE void fma_rows(__m256 (&c)[V], const float* x, const __m256 (&w)[V]) {
  const __m256 v = _mm256_broadcast_ss(x);
  for (int i = 0; i < V; ++i) c[i] = _mm256_fmadd_ps(v, w[i], c[i]);
}

#endif

// part[R][16] (+)= R rows of q times 32 k of 16 columns.
template <int R, bool kFirst>
PC_INLINE void chunk(const int8_t* q, int64_t stride, const uint8_t* wide, int32_t* part) {
  const __m256i* w = reinterpret_cast<const __m256i*>(wide);
  __m256i c[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int i = 0; i < kChunk / 4; ++i) {
    const __m256i w0 = _mm256_load_si256(w + 2 * i), w1 = _mm256_load_si256(w + 2 * i + 1);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) multiply_add(c[r][0], c[r][1], q + r * stride + 4 * i, w0, w1);
  }
  const __m256i one = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      __m256i* sum = reinterpret_cast<__m256i*>(part + r * 16 + 8 * v);
      const __m256i pairs = _mm256_madd_epi16(c[r][v], one);
      _mm256_store_si256(sum, kFirst ? pairs : _mm256_add_epi32(pairs, _mm256_load_si256(sum)));
    }
}

template <int R>
PC_INLINE void rows_int8(const Group& g, const int8_t* q, int64_t row, const uint8_t* wide, int column, int vectors) {
  alignas(32) int32_t part[R * 16];
  chunk<R, true>(q, g.row_stride, wide, part);
  for (int64_t i = kChunk; i < g.depth; i += kChunk) chunk<R, false>(q + i, g.row_stride, wide + i * 16, part);
  if (vectors == 2)
    finish_int8<R, 2>(g, row, column, part);
  else
    finish_int8<R, 1>(g, row, column, part);
}

template <int R, int V, int kI>
PC_INLINE void step(const uint32_t* weight, const float* const* x, __m256 (&c)[R][V]) {
  const __m256i mask = _mm256_set1_epi32(15 << kShift[kI]);
  __m256 w[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) w[v] = nibble<kI>(weight + 8 * v, mask);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) fma_rows<V>(c[r], x[r] + kI, w);
}

// One row: 8 chains of fma hide their latency.
template <int kI>
PC_INLINE void step(const uint32_t* weight, const float* const* x, __m256 (&c)[1][8]) {
  const __m256i mask = _mm256_set1_epi32(15 << kShift[kI]);
  const __m256 v = _mm256_broadcast_ss(x[0] + kI);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) c[0][i] = _mm256_fmadd_ps(v, nibble<kI>(weight + 8 * i, mask), c[0][i]);
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
    if constexpr (V == 8) {
      step<0>(weight, x, c), step<1>(weight, x, c), step<2>(weight, x, c), step<3>(weight, x, c);
      step<4>(weight, x, c), step<5>(weight, x, c), step<6>(weight, x, c), step<7>(weight, x, c);
    } else {
      step<R, V, 0>(weight, x, c), step<R, V, 1>(weight, x, c), step<R, V, 2>(weight, x, c), step<R, V, 3>(weight, x, c);
      step<R, V, 4>(weight, x, c), step<R, V, 5>(weight, x, c), step<R, V, 6>(weight, x, c), step<R, V, 7>(weight, x, c);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] += 8;
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
    for (; column + 64 <= g.cols; column += 64) rows_float<1, 8>(g, row, column);
  for (; column + 16 <= g.cols; column += 16) rows_float<R, 2>(g, row, column);
  for (; column < g.cols; column += 8) rows_float<R, 1>(g, row, column);
}

void group_float(const Group& g) {
  int rows = 0;
  for (int64_t r = 0; r < g.count; r += rows) {
    rows = next_rows(g.count - r);
    switch (rows) {
      case 1:
        panel_float<1>(g, r);
        break;
      case 2:
        panel_float<2>(g, r);
        break;
      case 3:
        panel_float<3>(g, r);
        break;
      case 4:
        panel_float<4>(g, r);
        break;
      case 5:
        panel_float<5>(g, r);
        break;
      default:
        panel_float<6>(g, r);
    }
  }
}

// Row by row: rows of an output are often a multiple of 4 KB apart, so that few of them fit L1 at a time.
template <Activation kActivation>
PC_INLINE void store_rows(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  const int whole = cols / 8 * 8;
  const __m256i rest = _mm256_cmpgt_epi32(_mm256_set1_epi32(cols - whole), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  for (int64_t r = 0; r < rows; ++r, acc += kNr, out += ldo) {
    const __m256 scale = _mm256_set1_ps(e.row_scale[r]), zero = _mm256_setzero_ps();
    for (int c = 0; c < whole; c += 8) {
      const __m256 y = _mm256_fmadd_ps(_mm256_load_ps(acc + c), scale, e.bias ? _mm256_loadu_ps(e.bias + c) : zero);
      _mm256_storeu_ps(out + c, activate_avx2(y, kActivation));
    }
    if (whole == cols) continue;
    const __m256 y = _mm256_fmadd_ps(_mm256_load_ps(acc + whole), scale, e.bias ? _mm256_maskload_ps(e.bias + whole, rest) : zero);
    _mm256_maskstore_ps(out + whole, rest, activate_avx2(y, kActivation));
  }
}

void store(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out,
           int64_t ldo){PC_WITH_ACTIVATION(e.activation, store_rows, acc, rows, cols, e, out, ldo)}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2", Isa::avx2, 8, &int8_matmul::kAvx2, quantize_row, group_int8, group_float, store};

}  // namespace pycompress::int4_matmul
#endif
