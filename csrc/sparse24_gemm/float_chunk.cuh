// A chunk of a 2:4 or 1:4 float32 weight: four kept values and a byte with their places, to groups of four dense ones in registers.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pycompress::sparse24_gemm {

// Group `group` of a chunk: 0 or 1 where kPer = 2 values of a group are kept, 0 to 3 where it is one.
template <int kPer>
__device__ __forceinline__ void expand_group(float (&w)[4], const float4& values, uint32_t places, int group) {
  const float kept[4] = {values.x, values.y, values.z, values.w};
  const uint32_t first = places >> (group * kPer * 2) & 3u, second = places >> (group * kPer * 2 + 2) & 3u;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    w[i] = first == i ? kept[group * kPer] : 0.0f;
    if (kPer == 2 && second == i) w[i] = kept[group * kPer + kPer - 1];
  }
}

}  // namespace pycompress::sparse24_gemm
