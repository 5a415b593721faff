// AVX2, small groups with channels in the lanes: dwords are two int16 operands, vpermd gives each lane that of its own group.
#include "core/target.h"
#if PC_X86
#include <immintrin.h>

#include <cmath>

#include "core/activation_simd.h"
#include "int8_conv2d/pixels.h"

namespace pycompress::int8_conv2d {
namespace {

PC_TARGET_BEGIN("avx2,fma,f16c")

PC_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
PC_INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

template <int kQuads>
void grouped_pixels(const GroupedPixels& p) {
  const int64_t taps = p.tap_count, quads = kQuads ? kQuads : p.quads, step = p.pixel_step, out_step = p.out_pixel;
  const int64_t* offsets = p.taps;
  const __m256i m0 = first(p.channels), m1 = first(p.channels - 8);
  const __m256 image = _mm256_set1_ps(p.image_scale), none = _mm256_setzero_ps(),
               scale0 = _mm256_mul_ps(image, _mm256_maskload_ps(p.scale, m0)),
               scale1 = _mm256_mul_ps(image, _mm256_maskload_ps(p.scale + 8, m1)), bias0 = p.bias ? _mm256_maskload_ps(p.bias, m0) : none,
               bias1 = p.bias ? _mm256_maskload_ps(p.bias + 8, m1) : none,
               floor = _mm256_set1_ps(p.activation == Activation::relu ? 0.0f : -INFINITY);
  const __m256i start0 = _mm256_sub_epi32(_mm256_setzero_si256(), load(p.offsets)),
                start1 = _mm256_sub_epi32(_mm256_setzero_si256(), load(p.offsets + 8));
  const char* x = p.x;
  float* out = p.out;
  for (int64_t i = 0; i < p.pixels; ++i, x += step, out += out_step) {
    __m256i acc0 = start0, acc1 = start1;
    const int32_t* w = p.weights;
    for (int64_t t = 0; t < taps; ++t) {
      const __m256i v = load(x + offsets[t]);
      for (int64_t q = 0; q < quads; ++q, w += 16) {
        const __m256i a = _mm256_permutevar8x32_epi32(v, load(p.index + 16 * q)),
                      b = _mm256_permutevar8x32_epi32(v, load(p.index + 16 * q + 8));
        acc0 = _mm256_add_epi32(acc0, _mm256_madd_epi16(a, load(w)));
        acc1 = _mm256_add_epi32(acc1, _mm256_madd_epi16(b, load(w + 8)));
      }
    }
    __m256 y0 = _mm256_max_ps(floor, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc0), scale0, bias0)),
           y1 = _mm256_max_ps(floor, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc1), scale1, bias1));
    if (p.activation > Activation::relu) y0 = activate_avx2(y0, p.activation), y1 = activate_avx2(y1, p.activation);
    _mm256_maskstore_ps(out, m0, y0);
    if (p.channels > 8) _mm256_maskstore_ps(out + 8, m1, y1);
  }
}

void grouped(const GroupedPixels& p) { p.quads == 2 ? grouped_pixels<2>(p) : grouped_pixels<0>(p); }

PC_TARGET_END

}  // namespace

extern const PixelKernel kPixelsAvx2;
const PixelKernel kPixelsAvx2 = {nullptr, nullptr, nullptr, grouped};

}  // namespace pycompress::int8_conv2d
#endif
