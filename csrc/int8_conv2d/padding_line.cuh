// What a copy reads that would come from outside the image: 16 bytes of the zero point, for each of the 256.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pycompress::int8_conv2d {

struct alignas(16) PaddingLines {
  int8_t of[256][16];
};

constexpr PaddingLines make_padding_lines() {
  PaddingLines lines{};
  for (int zero_point = -128; zero_point < 128; ++zero_point)
    for (int i = 0; i < 16; ++i) lines.of[zero_point + 128][i] = static_cast<int8_t>(zero_point);
  return lines;
}

// In global memory, as copies into shared memory need it.
static __device__ const PaddingLines padding_lines = make_padding_lines();

}  // namespace pycompress::int8_conv2d
