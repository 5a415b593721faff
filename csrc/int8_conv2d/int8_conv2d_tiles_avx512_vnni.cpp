// AVX-512 VNNI, tiles of the direct way: 6 pixels x 64 channels, 24 vectors of sums that become floats or bytes where they are.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include "core/activation_simd.h"
#include "int8_conv2d/tiles.h"

#if defined(__GNUC__)
#define PC_UNROLL _Pragma("GCC unroll 8")
#else
#define PC_UNROLL
#endif

namespace pycompress::int8_conv2d {
namespace {

constexpr int kKr = 4;

PC_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "int8_matmul/zmm_dot.h"  // NOLINT: inside the region on purpose

PC_INLINE __m512 as_float(__m512i bits) { return _mm512_castsi512_ps(bits); }
PC_INLINE __m512i as_bits(__m512 y) { return _mm512_castps_si512(y); }

bool takes(Activation activation) {
  return activation == Activation::none || activation == Activation::relu || activation == Activation::relu6;
}

// Sums to floats, in place.
template <int R, int V>
PC_INLINE void to_floats(__m512i (&c)[R][V], const Finish& f) {
  PC_UNROLL
  for (int v = 0; v < V; ++v) {
    const __m512i extra = _mm512_load_si512(f.extra + 16 * v);
    const __m512 scale = _mm512_load_ps(f.scale + 16 * v), bias = _mm512_load_ps(f.bias + 16 * v);
    PC_UNROLL
    for (int r = 0; r < R; ++r) c[r][v] = as_bits(_mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(c[r][v], extra)), scale, bias));
  }
}

template <int R, int V>
PC_INLINE void add_residual(__m512i (&c)[R][V], const Finish& f, const int8_t* residual) {
  const __m512 scale = _mm512_set1_ps(f.residual_scale);
  const __m512i zero_point = _mm512_set1_epi32(f.residual_zero_point);
  PC_UNROLL
  for (int r = 0; r < R; ++r, residual += f.channels) {
    PC_UNROLL
    for (int v = 0; v < V; ++v) {
      const int left = f.used - 16 * v;
      const __m128i bytes = v + 1 < V || left >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual + 16 * v))
                                                    : _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << left) - 1), residual + 16 * v);
      const __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepi8_epi32(bytes), zero_point));
      c[r][v] = as_bits(_mm512_add_ps(as_float(c[r][v]), _mm512_mul_ps(y, scale)));
    }
  }
}

// relu and relu6; NaN stays.
template <int R, int V>
PC_INLINE void activate(__m512i (&c)[R][V], Activation activation) {
  if (activation == Activation::none) return;
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    PC_UNROLL
    for (int v = 0; v < V; ++v) c[r][v] = as_bits(_mm512_max_ps(_mm512_setzero_ps(), as_float(c[r][v])));
  }
  if (activation == Activation::relu) return;
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    PC_UNROLL
    for (int v = 0; v < V; ++v) c[r][v] = as_bits(_mm512_min_ps(_mm512_set1_ps(6.0f), as_float(c[r][v])));
  }
}

template <int R, int V>
PC_INLINE void store_floats(const __m512i (&c)[R][V], const Finish& f, float* out) {
  const int left = f.used - 16 * (V - 1);
  const __mmask16 m = left >= 16 ? __mmask16(0xffff) : static_cast<__mmask16>((1u << left) - 1);
  PC_UNROLL
  for (int r = 0; r < R; ++r, out += f.channels) {
    PC_UNROLL
    for (int v = 0; v + 1 < V; ++v) _mm512_storeu_ps(out + 16 * v, as_float(c[r][v]));
    _mm512_mask_storeu_ps(out + 16 * (V - 1), m, as_float(c[r][V - 1]));
  }
}

// Rounded, NaN to 0, clamped: zero_point is still to be added.
template <int R, int V>
PC_INLINE void to_integers(__m512i (&c)[R][V], const Finish& f) {
  const __m512 inverse = _mm512_set1_ps(f.inverse), lo = _mm512_set1_ps(static_cast<float>(f.lowest - f.zero_point)),
               hi = _mm512_set1_ps(static_cast<float>(127 - f.zero_point));
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    PC_UNROLL
    for (int v = 0; v < V; ++v) {
      const __m512 y = _mm512_mul_ps(as_float(c[r][v]), inverse);
      const __mmask16 number = _mm512_cmp_ps_mask(y, y, _CMP_ORD_Q);
      c[r][v] = _mm512_maskz_cvtps_epi32(number, _mm512_min_ps(_mm512_max_ps(y, lo), hi));
    }
  }
}

template <int R, int V>
PC_INLINE void store_bytes(const __m512i (&c)[R][V], const Finish& f, int8_t* out) {
  // Packing works in 128-bit lanes: dword 4 i + j of what it leaves belongs at 4 j + i.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i zero_point = _mm512_set1_epi16(static_cast<int16_t>(f.zero_point)), none = _mm512_setzero_si512();
  const __mmask64 m = f.used >= 64 ? ~__mmask64{0} : (__mmask64{1} << f.used) - 1;
  PC_UNROLL
  for (int r = 0; r < R; ++r, out += f.channels) {
    const __m512i low = _mm512_packs_epi32(c[r][0], V > 1 ? c[r][V > 1 ? 1 : 0] : none);
    const __m512i high = V > 2 ? _mm512_packs_epi32(c[r][V > 2 ? 2 : 0], V > 3 ? c[r][V > 3 ? 3 : 0] : none) : none;
    const __m512i bytes = _mm512_packs_epi16(_mm512_add_epi16(low, zero_point), _mm512_add_epi16(high, zero_point));
    _mm512_mask_storeu_epi8(out, m, _mm512_permutexvar_epi32(order, bytes));
  }
}

template <int R, int V>
void tile_rows(const void* const* a, int segments, int64_t depth, const int8_t* b, const Finish& f, void* out, const int8_t* residual) {
  __m512i c[R][V];
  PC_UNROLL
  for (int r = 0; r < R; ++r) {
    PC_UNROLL
    for (int v = 0; v < V; ++v) c[r][v] = _mm512_setzero_si512();
  }
  for (int s = 0; s < segments; ++s, a += R) {
    const char* x[R];
    PC_UNROLL
    for (int r = 0; r < R; ++r) x[r] = static_cast<const char*>(a[r]);
    for (int64_t i = 0; i < depth; i += kKr, b += 64 * V) {
      __m512i w[V];
      PC_UNROLL
      for (int v = 0; v < V; ++v) w[v] = _mm512_load_si512(b + 64 * v);
      PC_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512i u = broadcast(x[r] + i);
        PC_UNROLL
        for (int v = 0; v < V; ++v) dot(c[r][v], u, w[v]);
      }
    }
  }
  to_floats(c, f);
  if (f.add) add_residual(c, f, residual);
  activate(c, f.activation);
  if (!f.bytes) return store_floats(c, f, static_cast<float*>(out));
  to_integers(c, f);
  store_bytes(c, f, static_cast<int8_t*>(out));
}

template <int V>
void tile_cols(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, const Finish& f, void* out,
               const int8_t* residual) {
  using Rows = void (*)(const void* const*, int, int64_t, const int8_t*, const Finish&, void*, const int8_t*);
  static constexpr Rows table[6] = {tile_rows<1, V>, tile_rows<2, V>, tile_rows<3, V>, tile_rows<4, V>, tile_rows<5, V>, tile_rows<6, V>};
  table[rows - 1](a, segments, depth, b, f, out, residual);
}

void tile(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, const Finish& f, void* out,
          const int8_t* residual) {
  switch ((f.used + 15) / 16) {
    case 1:
      return tile_cols<1>(a, rows, segments, depth, b, f, out, residual);
    case 2:
      return tile_cols<2>(a, rows, segments, depth, b, f, out, residual);
    case 3:
      return tile_cols<3>(a, rows, segments, depth, b, f, out, residual);
    default:
      return tile_cols<4>(a, rows, segments, depth, b, f, out, residual);
  }
}

PC_TARGET_END

}  // namespace

extern const TileKernel kTilesAvx512Vnni;
const TileKernel kTilesAvx512Vnni = {takes, tile};

}  // namespace pycompress::int8_conv2d
#endif
