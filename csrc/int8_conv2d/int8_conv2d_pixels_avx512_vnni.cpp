// AVX-512 VNNI, small groups with channels in the lanes.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include <cmath>

#include "core/activation_simd.h"
#include "int8_conv2d/pixels.h"

#if defined(__GNUC__)
#define PC_UNROLL _Pragma("GCC unroll 16")
#else
#define PC_UNROLL
#endif

namespace pycompress::int8_conv2d {
namespace {

PC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "int8_conv2d/zmm_operands.h"

PC_INLINE __mmask16 lanes_of(int64_t n) { return n <= 0 ? __mmask16(0) : first(n); }

float quantize(const float* x, int64_t x_step, int64_t channels, int64_t pixels, float inverse, int zero_point, int quant_min, char* dst,
               int64_t block_step) {
  const Quantizer q(inverse, zero_point, quant_min);
  const __m512 zero = _mm512_setzero_ps();
  __m512 bad[2] = {zero, zero};
  for (int64_t p = 0; p < pixels; ++p, x += x_step, dst += 64) {
    char* d = dst;
    int64_t c = 0;
    for (; c + 64 <= channels; c += 64, d += block_step) {
      __m512i v[4];
      PC_UNROLL
      for (int j = 0; j < 4; ++j) {
        __m512 f = _mm512_loadu_ps(x + c + 16 * j);
        PC_LOADED(f);
        bad[j % 2] = _mm512_fmadd_ps(f, zero, bad[j % 2]);
        v[j] = q.round(f);
      }
      _mm512_storeu_si512(d, q.narrow(v[0], v[1], v[2], v[3]));
    }
    if (c == channels) continue;
    __m512i v[4];
    PC_UNROLL
    for (int j = 0; j < 4; ++j) {
      __m512 f = _mm512_maskz_loadu_ps(lanes_of(channels - c - 16 * j), x + c + 16 * j);
      PC_LOADED(f);
      bad[j % 2] = _mm512_fmadd_ps(f, zero, bad[j % 2]);
      v[j] = q.round(f);
    }
    _mm512_storeu_si512(d, q.narrow(v[0], v[1], v[2], v[3]));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(bad[0], bad[1]));
}

void load(const int8_t* x, int64_t x_step, int64_t channels, int64_t pixels, char* dst, int64_t block_step) {
  const __m512i transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t p = 0; p < pixels; ++p, x += x_step, dst += 64) {
    char* d = dst;
    for (int64_t c = 0; c < channels; c += 64, d += block_step) {
      const __mmask64 m = channels - c >= 64 ? ~__mmask64{0} : (__mmask64{1} << (channels - c)) - 1;
      const __m512i v = _mm512_xor_si512(_mm512_maskz_loadu_epi8(m, x + c), _mm512_set1_epi8(-128));
      _mm512_storeu_si512(d, _mm512_permutexvar_epi32(transposed, v));
    }
  }
}

// Two vectors of 16 channels (half = 0: the first 32 of 64) of dwords of taps from pixel p on, `step` bytes between taps.
struct Dwords {
  __m512i v[2];
};
template <int kHalf>
PC_INLINE Dwords dwords(const char* p, int64_t step, int64_t taps) {
  // Where the kernel has fewer taps their weights are zero: any pixel will do.
  const __m512i a = _mm512_loadu_si512(p), b = taps > 1 ? _mm512_loadu_si512(p + step) : a,
                c = taps > 2 ? _mm512_loadu_si512(p + 2 * step) : a, d = taps > 3 ? _mm512_loadu_si512(p + 3 * step) : a;
  const __m512i ab = kHalf ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b),
                cd = kHalf ? _mm512_unpackhi_epi8(c, d) : _mm512_unpacklo_epi8(c, d);
  return {{_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd)}};
}

// 32 channels. By value: stores through vector intrinsics may alias everything that lies in memory.
struct Half {
  __m512i start[2];
  __m512 scale[2], bias[2], floor;
  __mmask16 m[2];
  Half(const DepthwisePixels& p, int half) : floor(_mm512_set1_ps(p.activation == Activation::relu ? 0.0f : -INFINITY)) {
    PC_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int64_t c = half * 32 + j * 16;
      m[j] = lanes_of(p.channels - c);
      start[j] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_maskz_loadu_epi32(m[j], p.offsets + c));
      scale[j] = _mm512_mul_ps(_mm512_set1_ps(p.image_scale), _mm512_maskz_loadu_ps(m[j], p.scale + c));
      bias[j] = p.bias ? _mm512_maskz_loadu_ps(m[j], p.bias + c) : _mm512_setzero_ps();
    }
  }
  PC_INLINE void store(float* out, const __m512i* acc) const {
    PC_UNROLL
    for (int j = 0; j < 2; ++j) {
      const __m512 y = _mm512_max_ps(floor, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[j]), scale[j], bias[j]));
      _mm512_mask_storeu_ps(out + 16 * j, m[j], y);
    }
  }
};

// Dwords stay in registers from one output row to the next: H kernel rows of up to 4 taps, S input rows per output row.
template <int kHalf, int H, int S, int kTaps>
void rolling(const DepthwisePixels& p) {
  const Half half(p, kHalf);
  __m512i w[H][2];
  PC_UNROLL
  for (int k = 0; k < H; ++k) {
    PC_UNROLL
    for (int j = 0; j < 2; ++j) w[k][j] = _mm512_loadu_si512(p.weights + k * p.weight_step + kHalf * 32 + 16 * j);
  }
  const int64_t row = p.row, step = p.dilation_w * 64, rows = p.rows, out_row = p.out_row;
  for (int64_t x = 0; x < p.cols; ++x) {
    const char* source = p.x + x * p.stride_w * 64;
    Dwords e[H];
    PC_UNROLL
    for (int k = S; k < H; ++k) e[k] = dwords<kHalf>(source, step, kTaps), source += row;
    float* out = p.out + x * p.out_pixel + kHalf * 32;
    for (int64_t y = 0; y < rows; ++y, out += out_row) {
      PC_UNROLL
      for (int k = 0; k < H - S; ++k) e[k] = e[k + S];
      PC_UNROLL
      for (int k = H - S; k < H; ++k) e[k] = dwords<kHalf>(source, step, kTaps), source += row;
      __m512i acc[2] = {half.start[0], half.start[1]};
      PC_UNROLL
      for (int k = 0; k < H; ++k) {
        PC_UNROLL
        for (int j = 0; j < 2; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], e[k].v[j], w[k][j]);
      }
      half.store(out, acc);
    }
  }
}

template <int kHalf>
void any(const DepthwisePixels& p) {
  const Half half(p, kHalf);
  const int64_t step = p.dilation_w * 64, parts = (p.kw + 3) / 4;
  for (int64_t y = 0; y < p.rows; ++y)
    for (int64_t x = 0; x < p.cols; ++x) {
      const char* source = p.x + y * p.stride_h * p.row + x * p.stride_w * 64;
      const int32_t* w = p.weights + kHalf * 32;
      __m512i acc[2] = {half.start[0], half.start[1]};
      for (int64_t k = 0; k < p.kh; ++k, source += p.dilation_h * p.row)
        for (int64_t d = 0; d < parts; ++d, w += p.weight_step) {
          const Dwords e = dwords<kHalf>(source + 4 * d * step, step, p.kw - 4 * d);
          PC_UNROLL
          for (int j = 0; j < 2; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], e.v[j], _mm512_loadu_si512(w + 16 * j));
        }
      half.store(p.out + y * p.out_row + x * p.out_pixel + kHalf * 32, acc);
    }
}

template <int kHalf>
void depthwise_half(const DepthwisePixels& p) {
  if (p.kh == 3 && p.kw == 3 && p.dilation_h == 1 && p.stride_h == 1) return rolling<kHalf, 3, 1, 3>(p);
  if (p.kh == 3 && p.kw == 3 && p.dilation_h == 1 && p.stride_h == 2) return rolling<kHalf, 3, 2, 3>(p);
  any<kHalf>(p);
}

void depthwise(const DepthwisePixels& p) {
  depthwise_half<0>(p);
  if (p.channels > 32) depthwise_half<1>(p);
  if (p.activation <= Activation::relu) return;
  for (int64_t y = 0; y < p.rows; ++y)
    for (int64_t x = 0; x < p.cols; ++x)
      for (int64_t c = 0; c < p.channels; c += 16) {
        float* out = p.out + y * p.out_row + x * p.out_pixel + c;
        const __mmask16 m = first(p.channels - c);
        _mm512_mask_storeu_ps(out, m, activate_avx512(_mm512_maskz_loadu_ps(m, out), p.activation));
      }
}

// The first kBytes bytes of 64: fewer of them cross a line.
template <int kBytes>
PC_INLINE __m512i load_groups(const char* p) {
  return kBytes == 16   ? _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
         : kBytes == 32 ? _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))
                        : _mm512_loadu_si512(p);
}

template <int kBytes, int kTaps, int kQuads>
void grouped_pixels(const GroupedPixels& p) {
  const __mmask16 m = first(p.channels);
  const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(p.image_scale), _mm512_maskz_loadu_ps(m, p.scale)),
               bias = p.bias ? _mm512_maskz_loadu_ps(m, p.bias) : _mm512_setzero_ps(),
               floor = _mm512_set1_ps(p.activation == Activation::relu ? 0.0f : -INFINITY);
  const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(p.offsets));
  const int64_t taps = kTaps ? kTaps : p.tap_count, quads = kQuads ? kQuads : p.quads, step = p.pixel_step, out_step = p.out_pixel;
  const int64_t* offsets = p.taps;
  __m512i index[kQuads ? kQuads : 1];
  PC_UNROLL
  for (int i = 0; i < kQuads; ++i) index[i] = _mm512_loadu_si512(p.index + 16 * i);
  const char* x = p.x;
  float* out = p.out;
  for (int64_t i = 0; i < p.pixels; ++i, x += step, out += out_step) {
    __m512i acc[2] = {start, _mm512_setzero_si512()};
    const int32_t* w = p.weights;
    PC_UNROLL
    for (int64_t t = 0; t < taps; ++t) {
      const __m512i v = load_groups<kBytes>(x + offsets[t]);
      PC_UNROLL
      for (int64_t q = 0; q < quads; ++q, w += 16) {
        const __m512i e = _mm512_permutexvar_epi32(kQuads ? index[kQuads ? q : 0] : _mm512_loadu_si512(p.index + 16 * q), v);
        __m512i& sum = acc[kTaps ? t % 2 : q % 2];
        sum = _mm512_dpbusd_epi32(sum, e, _mm512_loadu_si512(w));
      }
    }
    const __m512i sum = _mm512_add_epi32(acc[0], acc[1]);
    _mm512_mask_storeu_ps(out, m, _mm512_max_ps(floor, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, bias)));
  }
}

template <int kTaps, int kQuads>
void grouped_width(const GroupedPixels& p) {
  const int32_t* last = p.index + 16 * (p.quads - 1);
  int32_t top = 0;
  for (int64_t i = 0; i < p.channels; ++i) top = last[i] > top ? last[i] : top;
  if (top < 4) return grouped_pixels<16, kTaps, kQuads>(p);
  if (top < 8) return grouped_pixels<32, kTaps, kQuads>(p);
  grouped_pixels<64, kTaps, kQuads>(p);
}

void grouped(const GroupedPixels& p) {
  if (p.tap_count == 9 && p.quads == 1)
    grouped_width<9, 1>(p);
  else if (p.tap_count == 9 && p.quads == 2)
    grouped_width<9, 2>(p);
  else if (p.quads == 1)
    grouped_width<0, 1>(p);
  else if (p.quads == 2)
    grouped_width<0, 2>(p);
  else if (p.quads == 4)
    grouped_width<0, 4>(p);
  else
    grouped_width<0, 0>(p);
  if (p.activation <= Activation::relu) return;
  const __mmask16 m = first(p.channels);
  for (int64_t i = 0; i < p.pixels; ++i) {
    float* out = p.out + i * p.out_pixel;
    _mm512_mask_storeu_ps(out, m, activate_avx512(_mm512_maskz_loadu_ps(m, out), p.activation));
  }
}

PC_TARGET_END

}  // namespace

extern const PixelKernel kPixelsAvx512Vnni;
const PixelKernel kPixelsAvx512Vnni = {quantize, load, depthwise, grouped};

}  // namespace pycompress::int8_conv2d
#endif
