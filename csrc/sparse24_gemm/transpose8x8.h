// dst[k][r] = src[r][k] by 8 x 8 blocks in registers. Included inside the anonymous namespace and the target region of the AVX2 and
// AVX-512 kernels, so that each file has a copy of its own, compiled for its own target.
#pragma once

PC_INLINE void transpose8x8(const float* src, int64_t lds, float* dst, int64_t ldd) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(src + i * lds);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * ldd, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * ldd, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

void transpose(const float* src, int64_t lds, int rows, int64_t count, float* dst, int64_t ldd, int padded) {
  int r = 0;
  for (; r + 8 <= rows; r += 8) {
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) transpose8x8(src + r * lds + k, lds, dst + k * ldd + r, ldd);
    for (; k < count; ++k)
      for (int i = r; i < r + 8; ++i) dst[k * ldd + i] = src[i * lds + k];
  }
  for (int64_t k = 0; k < count; ++k)
    for (int i = r; i < padded; ++i) dst[k * ldd + i] = i < rows ? src[i * lds + k] : 0.0f;
}
