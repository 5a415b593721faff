// AVX-512 VNNI. int8 activations: vpdpbusd of u (0..15) with q straight into int32, nibbles unpacked in registers.
// Float activations: nibbles are converted where they lie in the dword (see kShift).
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include <cmath>

#include "core/activation_simd.h"
#include "core/float_rows.h"
#include "int4_matmul/int4_matmul.h"

namespace pycompress::int8_matmul {
extern const Kernel kAvx512Vnni;
}

namespace pycompress::int4_matmul {
namespace {

// Register tile of 6 x 64: 24 accumulators, 2 vectors of weights, the mask; rows come as broadcasts from memory.
// With several tiles the nibbles of a group are unpacked once, to 8 KB that stay in L1.
constexpr int kTileRows = 6;

// Bytes between the weights in use and those that are fetched: a group is short, so the hardware's prefetching starts anew all the time.
// 2, 4, 8, 16, 32 KB: 244, 230, 215, 234, 250 us for one row and 4096 x 4096 from memory (Zen 5).
constexpr int64_t kAhead = 8192;

PC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

PC_INLINE __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, int8_t* q) {
  const __m512 inv = _mm512_set1_ps(inverse), lo = _mm512_set1_ps(-127.0f), hi = _mm512_set1_ps(127.0f);
  for (int64_t i = 0; i < kp; i += 16) {  // kp is a multiple of 32
    const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(first(k - i > 0 ? k - i : 0), x + i), inv);
    const __m512i v = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(y, lo), hi));  // NaN ends as lo
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(v));
  }
}

PC_INLINE __m512i zeros(const uint8_t* zero, int c) {
  return zero ? _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero + c))) : _mm512_set1_epi32(8);
}

// The inner steps, in an order that compilers may not change: they share broadcasts, run out of registers and spill.
#if defined(__GNUC__)
PC_INLINE void dot(__m512i& c, __m512i w, const int32_t* q) {
  __asm__ volatile("vpdpbusd %[q]%{1to16%},%[w],%[c]" : [c] "+v"(c) : [w] "v"(w), [q] "m"(*q));
}
PC_INLINE void dot(__m512i& c, __m512i w, __m512i q) { __asm__ volatile("vpdpbusd %[q],%[w],%[c]" : [c] "+v"(c) : [w] "v"(w), [q] "v"(q)); }
PC_INLINE __m512i broadcast(const char* four) {
  __m512i v;
  __asm__ volatile("vpbroadcastd %[four],%[v]" : [v] "=v"(v) : [four] "m"(*reinterpret_cast<const char (*)[4]>(four)));
  return v;
}
PC_INLINE void fma(__m512& c, __m512 w, const float* x) {
  __asm__ volatile("vfmadd231ps %[x]%{1to16%},%[w],%[c]" : [c] "+v"(c) : [w] "v"(w), [x] "m"(*x));
}
#else
PC_INLINE void dot(__m512i& c, __m512i w, const int32_t* q) { c = _mm512_dpbusd_epi32(c, w, _mm512_set1_epi32(*q)); }
PC_INLINE void dot(__m512i& c, __m512i w, __m512i q) { c = _mm512_dpbusd_epi32(c, w, q); }
PC_INLINE __m512i broadcast(const char* four) { return _mm512_set1_epi32(load32(four)); }
PC_INLINE void fma(__m512& c, __m512 w, const float* x) { c = _mm512_fmadd_ps(_mm512_set1_ps(*x), w, c); }
#endif

PC_INLINE void fetch(const uint32_t* weight) { _mm_prefetch(reinterpret_cast<const char*>(weight) + kAhead, _MM_HINT_T0); }

// What the sums start with: minus z times the sum of q. It fits int16, the upper half of zero's lanes is 0: vpmaddwd is a product that is
// cheaper than vpmulld.
template <int R, int V>
PC_INLINE void start(const Group& g, int64_t row, __m512i (&c)[R][V]) {
  const char* sums = static_cast<const char*>(g.sums) + row * g.sum_stride;
  const __m512i none = _mm512_setzero_si512();
  if (!g.zero) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i sum = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(sums + r * g.sum_stride));
      c[r][0] = _mm512_sub_epi32(none, _mm512_slli_epi32(sum, 3));
#pragma GCC unroll 4
      for (int v = 1; v < V; ++v) c[r][v] = c[r][0];
    }
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const __m512i zero = zeros(g.zero, 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i sum = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(sums + r * g.sum_stride));
      c[r][v] = _mm512_sub_epi32(none, _mm512_madd_epi16(sum, zero));
    }
  }
}

// a = fma(part, scale, a), from 0 in the first group; the last one goes on to the output.
template <int R, int V>
PC_INLINE void finish(const Group& g, int64_t row, const __m512i (&c)[R][V]) {
  float* acc = g.acc + row * kNr;
  if (!g.first && !g.last) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 scale = _mm512_loadu_ps(g.scale + 16 * v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* a = acc + r * kNr + 16 * v;
        _mm512_store_ps(a, _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[r][v]), scale, _mm512_load_ps(a)));
      }
    }
    return;
  }
  const float* row_scale = g.last ? g.last->row_scale + row : nullptr;
  float* out = g.last ? g.out + row * g.ldo : nullptr;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const __m512 scale = _mm512_loadu_ps(g.scale + 16 * v);
    const __mmask16 m = v + 1 < V ? __mmask16(0xffff) : first(g.used - 16 * v);
    const __m512 bias = g.last && g.last->bias ? _mm512_maskz_loadu_ps(m, g.last->bias + 16 * v) : _mm512_setzero_ps();
    // relu as a maximum with 0, nothing as one with -Inf; both keep NaN.
    const __m512 floor = _mm512_set1_ps(g.last && g.last->activation == Activation::relu ? 0.0f : -INFINITY);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 before = g.first ? _mm512_setzero_ps() : _mm512_load_ps(acc + r * kNr + 16 * v);
      const __m512 a = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[r][v]), scale, before);
      if (!g.last) {
        _mm512_store_ps(acc + r * kNr + 16 * v, a);
        continue;
      }
      const __m512 y = _mm512_max_ps(floor, _mm512_fmadd_ps(a, _mm512_set1_ps(row_scale[r]), bias));
      if (v + 1 < V)
        _mm512_storeu_ps(out + r * g.ldo + 16 * v, y);
      else
        _mm512_mask_storeu_ps(out + r * g.ldo + 16 * v, m, y);
    }
  }
}

template <int R, int V>
PC_INLINE void rows_int8(const Group& g, int64_t row) {
  __m512i c[R][V];
  start<R, V>(g, row, c);
  const int32_t* q[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) q[r] = reinterpret_cast<const int32_t*>(static_cast<const char*>(g.rows) + (row + r) * g.row_stride);
  const __m512i mask = _mm512_set1_epi8(15);
  const uint32_t* weight = g.weight;
  for (int64_t i = 0; i < g.depth / 4; i += 2, weight += 16 * V) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512i w = _mm512_loadu_si512(weight + 16 * v);
      fetch(weight + 16 * v);
      const __m512i low = _mm512_and_si512(w, mask), high = _mm512_and_si512(_mm512_srli_epi32(w, 4), mask);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) dot(c[r][v], low, q[r] + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) dot(c[r][v], high, q[r] + i + 1);
    }
  }
  finish<R, V>(g, row, c);
}

// Nibbles of a group to bytes: [depth / 4][columns][4 k].
template <int V>
PC_INLINE void unpack(const Group& g, uint8_t* wide) {
  const __m512i mask = _mm512_set1_epi8(15);
  const uint32_t* weight = g.weight;
  for (int64_t i = 0; i < g.depth / 8; ++i, weight += 16 * V, wide += 128 * V)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512i w = _mm512_loadu_si512(weight + 16 * v);
      fetch(weight + 16 * v);
      _mm512_store_si512(wide + 64 * v, _mm512_and_si512(w, mask));
      _mm512_store_si512(wide + 64 * (V + v), _mm512_and_si512(_mm512_srli_epi32(w, 4), mask));
    }
}

// R rows times a group that unpack() has widened.
template <int R, int V>
PC_INLINE void rows_wide(const Group& g, int64_t row, const uint8_t* wide) {
  __m512i c[R][V];
  start<R, V>(g, row, c);
  const int64_t stride = g.row_stride;
  const char *x = static_cast<const char*>(g.rows) + row * stride, *x3 = x + 3 * stride;
  for (int64_t i = 0; i < g.depth / 4; ++i, wide += 64 * V, x += 4, x3 += 4) {
    __m512i w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = _mm512_load_si512(wide + 64 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i four = broadcast((r < 3 ? x : x3) + r % 3 * stride);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) dot(c[r][v], w[v], four);
    }
  }
  finish<R, V>(g, row, c);
}

// One nibble of 16 columns as u * 2^kShift.
template <int kI>
PC_INLINE __m512 nibble(__m512i w) {
  return _mm512_cvtepi32_ps(kI == 7 ? _mm512_srli_epi32(w, 28) : _mm512_and_si512(w, _mm512_set1_epi32(15 << kShift[kI])));
}

template <int R, int V, int kI>
PC_INLINE void step(const __m512i (&weight)[V], const float* const* x, int64_t i, __m512 (&c)[R][V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const __m512 w = nibble<kI>(weight[v]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) fma(c[r][v], w, x[r] + i + kI);
  }
}

template <int R, int V>
PC_INLINE void rows_float(const Group& g, int64_t row) {
  __m512 c[R][V];
  const float* x[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    x[r] = reinterpret_cast<const float*>(static_cast<const char*>(g.rows) + (row + r) * g.row_stride);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[r][v] = _mm512_setzero_ps();
  }
  const uint32_t* weight = g.weight;
  for (int64_t i = 0; i < g.depth; i += 8, weight += 16 * V) {
    __m512i w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      w[v] = _mm512_loadu_si512(weight + 16 * v);
      fetch(weight + 16 * v);
    }
    step<R, V, 0>(w, x, i, c);
    step<R, V, 1>(w, x, i, c);
    step<R, V, 2>(w, x, i, c);
    step<R, V, 3>(w, x, i, c);
    step<R, V, 4>(w, x, i, c);
    step<R, V, 5>(w, x, i, c);
    step<R, V, 6>(w, x, i, c);
    step<R, V, 7>(w, x, i, c);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const __m512 scale = _mm512_loadu_ps(g.scale + 16 * v), zero = _mm512_cvtepi32_ps(zeros(g.zero, 16 * v));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 sum = _mm512_set1_ps(*reinterpret_cast<const float*>(static_cast<const char*>(g.sums) + (row + r) * g.sum_stride));
      float* acc = g.acc + (row + r) * kNr + 16 * v;
      _mm512_store_ps(acc, _mm512_fmadd_ps(_mm512_fnmadd_ps(zero, sum, c[r][v]), scale, _mm512_load_ps(acc)));
    }
  }
}

template <bool kInt8, int R, int V>
PC_INLINE void rows(const Group& g, int64_t row, const uint8_t* wide) {
  if constexpr (!kInt8)
    rows_float<R, V>(g, row);
  else if (wide)
    rows_wide<R, V>(g, row, wide);
  else
    rows_int8<R, V>(g, row);
}

template <bool kInt8, int V>
void panel(const Group& g) {
  alignas(64) uint8_t bytes[kInt8 ? kMaxGroup * 16 * V : 1];
  const bool several = kInt8 && g.count > kTileRows;
  if constexpr (kInt8)
    if (several) unpack<V>(g, bytes);
  const uint8_t* wide = several ? bytes : nullptr;
  int count = 0;
  for (int64_t r = 0; r < g.count; r += count) {
    count = next_rows(g.count - r);
    switch (count) {
      case 1:
        rows<kInt8, 1, V>(g, r, wide);
        break;
      case 2:
        rows<kInt8, 2, V>(g, r, wide);
        break;
      case 3:
        rows<kInt8, 3, V>(g, r, wide);
        break;
      case 4:
        rows<kInt8, 4, V>(g, r, wide);
        break;
      case 5:
        rows<kInt8, 5, V>(g, r, wide);
        break;
      default:
        rows<kInt8, 6, V>(g, r, wide);
    }
  }
}

template <bool kInt8>
void group(const Group& g) {
  switch (g.cols / 16) {
    case 1:
      return panel<kInt8, 1>(g);
    case 2:
      return panel<kInt8, 2>(g);
    case 3:
      return panel<kInt8, 3>(g);
    default:
      return panel<kInt8, 4>(g);
  }
}

// Row by row: rows of an output are often a multiple of 4 KB apart, so that few of them fit L1 at a time.
template <Activation kActivation>
PC_INLINE void store_rows(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r, acc += kNr, out += ldo) {
    const __m512 scale = _mm512_set1_ps(e.row_scale[r]);
    for (int c = 0; c < cols; c += 16) {
      const __mmask16 m = first(cols - c);
      const __m512 bias = e.bias ? _mm512_maskz_loadu_ps(m, e.bias + c) : _mm512_setzero_ps();
      const __m512 y = activate_avx512(_mm512_fmadd_ps(_mm512_load_ps(acc + c), scale, bias), kActivation);
      if (m == 0xffff)
        _mm512_storeu_ps(out + c, y);
      else
        _mm512_mask_storeu_ps(out + c, m, y);
    }
  }
}

void store(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out,
           int64_t ldo){PC_WITH_ACTIVATION(e.activation, store_rows, acc, rows, cols, e, out, ldo)}

PC_TARGET_END

}  // namespace

extern const Kernel kAvx512Vnni;
const Kernel kAvx512Vnni = {"avx512_vnni", Isa::avx512_vnni, 16, &int8_matmul::kAvx512Vnni, quantize_row, group<true>, group<false>, store,
                            true};

}  // namespace pycompress::int4_matmul
#endif
