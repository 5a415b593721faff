// An unfolded image whose pieces are gathered while they are needed, so that the whole of it, kernel size times the image, never
// exists. Position p of the output (row by row) sees k = channels * kernel_h * kernel_w values, in this order of k.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace pycompress {

struct Unfold {
  const float* image;  // (channels, height, width), contiguous, padding included; null: no image
  int64_t channels, height, width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int64_t out_w;  // positions in a row of the output

  int64_t depth() const { return channels * kernel_h * kernel_w; }
};

// dst[k] = what position p sees.
inline void unfold_position(const Unfold& u, int64_t p, float* dst) {
  const float* corner = u.image + p / u.out_w * u.stride_h * u.width + p % u.out_w * u.stride_w;
  const int64_t plane = u.height * u.width, step = u.dilation_h * u.width;
  int64_t c = 0;
  if (u.kernel_w == 3 && u.dilation_w == 1) {
    // Three neighbours as four: the fourth is overwritten by the next piece, and behind all planes but the last there is something to read.
    for (; c + 1 < u.channels; ++c, corner += plane) {
      const float* src = corner;
      for (int64_t i = 0; i < u.kernel_h; ++i, dst += 3, src += step) std::memcpy(dst, src, 16);
    }
  }
  for (; c < u.channels; ++c, corner += plane)
    for (int64_t i = 0; i < u.kernel_h; ++i, dst += u.kernel_w)
      for (int64_t j = 0; j < u.kernel_w; ++j) dst[j] = corner[i * step + j * u.dilation_w];
}

// dst[k * ldd + p - first] for the positions [first, first + count).
inline void unfold_positions(const Unfold& u, int64_t first, int64_t count, float* dst, int64_t ldd) {
  for (int64_t done = 0; done < count;) {  // positions in one row of the output
    const int64_t p = first + done, x = p % u.out_w, n = std::min(count - done, u.out_w - x);
    const float* corner = u.image + p / u.out_w * u.stride_h * u.width + x * u.stride_w;
    float* to = dst + done;
    for (int64_t c = 0; c < u.channels; ++c, corner += u.height * u.width)
      for (int64_t i = 0; i < u.kernel_h; ++i)
        for (int64_t j = 0; j < u.kernel_w; ++j, to += ldd) {
          const float* src = corner + i * u.dilation_h * u.width + j * u.dilation_w;
          if (u.stride_w == 1) {
            for (int64_t t = 0; t < n; ++t) to[t] = src[t];
          } else {
            for (int64_t t = 0; t < n; ++t) to[t] = src[t * u.stride_w];
          }
        }
    done += n;
  }
}

}  // namespace pycompress
