// Taps of one channel as dwords: the shuffles and masks of planes.h.
#include "int8_conv2d/layout.h"
#include "int8_conv2d/planes.h"

namespace pycompress::int8_conv2d {

Taps::Taps(const Shape& s, int64_t out_w, int nothing_, uint64_t* inside_memory)
    : w(s.w), stride(s.stride_w), dilation(s.dilation_w), pad(s.pad_w), parts(ceil_div(s.kw, 4)), nothing(nothing_), inside(inside_memory) {
  for (int i = 0; i < 16; ++i) dwords[i] = static_cast<int32_t>(i / 4 * stride + i % 4);
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<int8_t>(i % 16 / 4 * stride + i % 4 * dilation);
  for (int64_t x = 0; x < out_w; x += 16)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t from = offset(x, part);
      uint64_t m = 0;
      for (int i = 0; i < 64; ++i) {
        const int64_t at = from + i / 4 * stride + i % 4 * dilation;
        m |= static_cast<uint64_t>(at >= 0 && at < w) << i;
      }
      *inside_memory++ = m;
    }
}

}  // namespace pycompress::int8_conv2d
