// AVX-512 VNNI with pixels in the lanes: 16 pixels of one output channel per accumulator.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include <cmath>

#include "core/activation_simd.h"
#include "int8_conv2d/planes.h"

#if defined(__GNUC__)
#define PC_LAMBDA_INLINE __attribute__((always_inline))
#define PC_UNROLL _Pragma("GCC unroll 16")
#else
#define PC_LAMBDA_INLINE
#define PC_UNROLL
#endif

namespace pycompress::int8_conv2d {
namespace {

PC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,popcnt")

#include "int8_conv2d/zmm_operands.h"

PC_INLINE __mmask16 lanes_of(int64_t n) { return n <= 0 ? __mmask16(0) : first(n); }

float quantize_bytes(const float* x, int64_t count, float inverse, int zero_point, int quant_min, char* dst) {
  const Quantizer q(inverse, zero_point, quant_min);
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512 zero = _mm512_setzero_ps();
  __m512 bad = zero;
  for (int64_t i = 0; i < count; i += 64) {
    __m512i v[4];
    PC_UNROLL
    for (int j = 0; j < 4; ++j) {
      __m512 f = count - i >= 64 ? _mm512_loadu_ps(x + i + 16 * j) : _mm512_maskz_loadu_ps(lanes_of(count - i - 16 * j), x + i + 16 * j);
      PC_LOADED(f);
      bad = _mm512_fmadd_ps(f, zero, bad);
      v[j] = q.round(f);
    }
    _mm512_storeu_si512(dst + i, _mm512_permutexvar_epi32(in_order, q.narrow(v[0], v[1], v[2], v[3])));
  }
  return _mm512_reduce_add_ps(bad);
}

float quantize_dwords(const float* x, int64_t plane, int64_t row, int64_t channels, int64_t rows, int64_t count, int64_t stride,
                      float inverse, int zero_point, int quant_min, const DwordTarget* targets, int64_t target_count, int64_t dst_row,
                      const PlaneVector* vectors) {
  const Quantizer q(inverse, zero_point, quant_min);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  __m512 bad = _mm512_setzero_ps();
  const auto dwords = [&](const float* f, int64_t i) {
    return channels >= 4 && count - i >= 16 ? quantize4<true>(q, f + i, plane, 4, 0xffff, 4 * plane, bad)
                                            : quantize4<false>(q, f + i, plane, channels, lanes_of(count - i), 4 * plane, bad);
  };
  if (vectors) {
    for (int64_t i = 0; i < count; i += 16, ++vectors) _mm512_storeu_si512(targets->dst + vectors->a, dwords(x, i));
    return _mm512_reduce_add_ps(bad);
  }
  const auto put = [&](const DwordTarget& t, int64_t y, int64_t i, __m512i v) {
    char* d = t.dst + y * dst_row + 4 * i;
    if (i >= t.skip)
      _mm512_storeu_si512(d, v);
    else
      _mm512_mask_storeu_epi32(d, static_cast<__mmask16>(~lanes_of(t.skip - i)), v);
  };
  for (int64_t y = 0; y < rows; ++y, x += row) {
    if (stride == 1) {
      for (int64_t i = 0; i < count; i += 16) {
        const __m512i v = dwords(x, i);
        for (int64_t t = 0; t < target_count; ++t) put(targets[t], y, i, v);
      }
    } else {
      for (int64_t i = 0; i < count; i += 32) {
        const __m512i a = dwords(x, i), b = count - i > 16 ? dwords(x, i + 16) : a,
                      v[2] = {_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b)};
        for (int64_t t = 0; t < target_count; ++t) put(targets[t], y, i / 2, targets[t].odd ? v[1] : v[0]);
      }
    }
  }
  return _mm512_reduce_add_ps(bad);
}

// A row of bytes as dwords of taps.
struct Gather {
  __m512i dwords, bytes, nothing;
  explicit Gather(const Taps& t)
      : dwords(_mm512_load_si512(t.dwords)), bytes(_mm512_load_si512(t.bytes)), nothing(_mm512_set1_epi8(static_cast<char>(t.nothing))) {}
  PC_INLINE __m512i load(const char* p, __mmask64 m) const {
    return _mm512_mask_shuffle_epi8(nothing, m, _mm512_permutexvar_epi32(dwords, _mm512_loadu_si512(p)), bytes);
  }
};

void gather(const char* row, const Taps& taps, int64_t part, int64_t pixels, char* dst) {
  const Gather g(taps);
  for (int64_t x = 0; x < pixels; x += 16)
    _mm512_storeu_si512(dst + 4 * x, g.load(row + taps.offset(x, part), taps.inside[x / 16 * taps.parts + part]));
}

// The results that `keep` names, without gaps, from `out` on.
PC_INLINE void put(float* out, __mmask16 keep, __m512 y) {
  if (keep == 0xffff)
    _mm512_storeu_ps(out, y);
  else
    _mm512_mask_storeu_ps(out, first(_mm_popcnt_u32(keep)), _mm512_maskz_compress_ps(keep, y));
}

void activate_tile(const PlaneTile& t) {
  for (int c = 0; c < t.channels; ++c)
    for (int v = 0; v < t.vectors; ++v) {
      const __mmask16 m = first(_mm_popcnt_u32(t.keep[v]));
      float* out = t.out[v] + c * t.plane;
      _mm512_mask_storeu_ps(out, m, activate_avx512(_mm512_maskz_loadu_ps(m, out), t.activation));
    }
}

template <int V, int R>
void tile_rows(const PlaneTile& t) {
  __m512i acc[R][V];
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    PC_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_si512();
  }
  const char* a[V];
  PC_UNROLL
  for (int v = 0; v < V; ++v) a[v] = t.a[v];
  const char* b = reinterpret_cast<const char*>(t.b);
  const int64_t *a_steps = t.a_steps, *b_steps = t.b_steps;
  for (int64_t i = 0; i < t.steps; ++i) {
    const int64_t at = a_steps[i];
    const char* w = b + b_steps[i];
    __m512i x[V];
    PC_UNROLL
    for (int v = 0; v < V; ++v) x[v] = _mm512_loadu_si512(a[v] + at);
    PC_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512i u = _mm512_set1_epi32(load32(w + 4 * r));
      PC_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], x[v], u);
    }
  }
  const __m512 floor = _mm512_set1_ps(t.activation == Activation::relu ? 0.0f : -INFINITY);
  float* out[V];
  __mmask16 keep[V];
  PC_UNROLL
  for (int v = 0; v < V; ++v) out[v] = t.out[v], keep[v] = t.keep[v];
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    if (r >= t.channels) break;
    const __m512 scale = _mm512_set1_ps(t.image_scale * t.scale[r]), bias = _mm512_set1_ps(t.bias ? t.bias[r] : 0.0f);
    const __m512i extra =
        _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(t.correction) * static_cast<uint32_t>(t.column_sum[r])));
    PC_UNROLL
    for (int v = 0; v < V; ++v) {
      const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][v], extra)), scale, bias);
      put(out[v] + r * t.plane, keep[v], _mm512_max_ps(floor, y));
    }
  }
  if (t.activation > Activation::relu) activate_tile(t);
}

void tile(const PlaneTile& t) {
  using Rows = void (*)(const PlaneTile&);
  static constexpr Rows table[2][3] = {{tile_rows<1, 4>, tile_rows<2, 4>, tile_rows<3, 4>},
                                       {tile_rows<1, 8>, tile_rows<2, 8>, tile_rows<3, 8>}};
  table[t.channels > 4][t.vectors - 1](t);
}

// What all vectors of a depthwise plane share. By value: stores through vector intrinsics may alias everything that lies in memory.
struct Finish {
  __m512i start;
  __m512 scale, bias, floor;
  explicit Finish(const DepthwisePlane& p)
      : start(_mm512_set1_epi32(-p.offset)),
        scale(_mm512_set1_ps(p.scale)),
        bias(_mm512_set1_ps(p.bias)),
        floor(_mm512_set1_ps(p.activation == Activation::relu ? 0.0f : -INFINITY)) {}
  PC_INLINE void store(float* out, __mmask16 m, __m512i acc) const {
    _mm512_mask_storeu_ps(out, m, _mm512_max_ps(floor, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scale, bias)));
  }
};

// Rows of taps stay in registers from one output row to the next: H kernel rows of P dwords, S input rows per output row.
template <int H, int P, int S>
void depthwise_rows(const DepthwisePlane& p) {
  const Taps& taps = *p.taps;
  const Gather g(taps);
  const Finish finish(p);
  __m512i w[H][P];
  PC_UNROLL
  for (int k = 0; k < H; ++k) {
    PC_UNROLL
    for (int d = 0; d < P; ++d) w[k][d] = _mm512_set1_epi32(p.weights[(k * P + d) * p.weight_step]);
  }
  const int64_t ow = p.ow, ldo = p.ldo, width = taps.w, height = p.h, rows = p.y1 - p.y0, h0 = p.y0 * S - p.pad_h;
  for (int64_t x = 0; x < ow; x += 16) {
    __mmask64 inside[P];
    const char* source[P];
    PC_UNROLL
    for (int d = 0; d < P; ++d) inside[d] = taps.inside[x / 16 * P + d], source[d] = p.x + h0 * width + taps.offset(x, d);
    __m512i e[H][P];
    int64_t h = h0;  // input row of the next one to load
    const auto load = [&](int k) PC_LAMBDA_INLINE {
      const bool there = static_cast<uint64_t>(h) < static_cast<uint64_t>(height);
      PC_UNROLL
      for (int d = 0; d < P; ++d) {
        e[k][d] = g.nothing;
        if (there) e[k][d] = g.load(source[d], inside[d]);
        source[d] += width;
      }
      ++h;
    };
    PC_UNROLL
    for (int k = S; k < H; ++k) load(k);
    const __mmask16 m = first(ow - x);
    float* out = p.out + x;
    for (int64_t y = 0; y < rows; ++y, out += ldo) {
      PC_UNROLL
      for (int k = 0; k < H - S; ++k) {
        PC_UNROLL
        for (int d = 0; d < P; ++d) e[k][d] = e[k + S][d];
      }
      PC_UNROLL
      for (int k = H - S; k < H; ++k) load(k);
      __m512i acc = finish.start;
      PC_UNROLL
      for (int k = 0; k < H; ++k) {
        PC_UNROLL
        for (int d = 0; d < P; ++d) acc = _mm512_dpbusd_epi32(acc, e[k][d], w[k][d]);
      }
      finish.store(out, m, acc);
    }
  }
}

void depthwise_any(const DepthwisePlane& p) {
  const Taps& taps = *p.taps;
  const Gather g(taps);
  const Finish finish(p);
  for (int64_t x = 0; x < p.ow; x += 16) {
    const __mmask16 m = first(p.ow - x);
    float* out = p.out + x;
    for (int64_t y = p.y0; y < p.y1; ++y, out += p.ldo) {
      __m512i acc = finish.start;
      for (int64_t d = 0; d < taps.parts; ++d) {
        const __mmask64 inside = taps.inside[x / 16 * taps.parts + d];
        for (int64_t k = 0; k < p.kh; ++k) {
          const int64_t h = y * p.stride_h - p.pad_h + k * p.dilation_h;
          if (h < 0 || h >= p.h) {
            acc = _mm512_dpbusd_epi32(acc, g.nothing, _mm512_set1_epi32(p.weights[(k * taps.parts + d) * p.weight_step]));
            continue;
          }
          const __m512i e = g.load(p.x + h * taps.w + taps.offset(x, d), inside);
          acc = _mm512_dpbusd_epi32(acc, e, _mm512_set1_epi32(p.weights[(k * taps.parts + d) * p.weight_step]));
        }
      }
      finish.store(out, m, acc);
    }
  }
}

void depthwise_sums(const DepthwisePlane& p) {
  if (p.dilation_h == 1 && p.kh == 3 && p.taps->parts == 1 && p.stride_h == 1) return depthwise_rows<3, 1, 1>(p);
  if (p.dilation_h == 1 && p.kh == 3 && p.taps->parts == 1 && p.stride_h == 2) return depthwise_rows<3, 1, 2>(p);
  if (p.dilation_h == 1 && p.kh == 5 && p.taps->parts == 2 && p.stride_h == 1) return depthwise_rows<5, 2, 1>(p);
  if (p.dilation_h == 1 && p.kh == 5 && p.taps->parts == 2 && p.stride_h == 2) return depthwise_rows<5, 2, 2>(p);
  if (p.dilation_h == 1 && p.kh == 7 && p.taps->parts == 2 && p.stride_h == 1) return depthwise_rows<7, 2, 1>(p);
  depthwise_any(p);
}

void depthwise(const DepthwisePlane& p) {
  depthwise_sums(p);
  if (p.activation <= Activation::relu) return;
  for (int64_t y = 0; y < p.y1 - p.y0; ++y)
    for (int64_t x = 0; x < p.ow; x += 16) {
      float* out = p.out + y * p.ldo + x;
      const __mmask16 m = first(p.ow - x);
      _mm512_mask_storeu_ps(out, m, activate_avx512(_mm512_maskz_loadu_ps(m, out), p.activation));
    }
}

PC_TARGET_END

}  // namespace

extern const PlaneKernel kPlanesAvx512Vnni;
const PlaneKernel kPlanesAvx512Vnni = {16, quantize_bytes, quantize_dwords, gather, tile, depthwise};

}  // namespace pycompress::int8_conv2d
#endif
