// What the kernels of int4 weights with int8 activations share: nibbles to the operand of mma.sync, and the way out.
#pragma once
#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "weight_only/weight_only_cuda.h"

namespace pycompress::weight_only {

// Of a block of 128 k, in the layout of weight_only_cuda.h.
constexpr int kBlockK = 128, kBlockBytes = 64, kChunks = 4;

// The eight nibbles of a word less `zero` (0 to 15, in all four bytes) as int8, k rising: b[0] is k = 0..3, b[1] k = 4..7.
__device__ __forceinline__ void nibbles_to_int8(uint32_t (&b)[2], uint32_t word, uint32_t zeros) {
  // 128 + u - zero borrows from no neighbour; without the 128 it is the signed byte.
  const uint32_t low = (((word & 0x0f0f0f0fu) | 0x80808080u) - zeros) ^ 0x80808080u;        // k = 0, 4, 1, 5
  const uint32_t high = (((word >> 4 & 0x0f0f0f0fu) | 0x80808080u) - zeros) ^ 0x80808080u;  // k = 2, 6, 3, 7
  b[0] = __byte_perm(low, high, 0x6420);
  b[1] = __byte_perm(low, high, 0x7531);
}

__device__ __forceinline__ uint32_t word_of(const uint4& w, int chunk) {
  return chunk == 0 ? w.x : chunk == 1 ? w.y : chunk == 2 ? w.z : w.w;
}

// Sums start here: added to it, an integer below 2^22 is the mantissa of a float, and no conversion is needed. |part| <= 128 * 127 * 15.
constexpr int32_t kMagic = 0x4b400000;      // the bits of kMagicFloat
constexpr float kMagicFloat = 12582912.0f;  // 1.5 * 2^23

__device__ __forceinline__ float part_of(int32_t sum) { return __int_as_float(sum) - kMagicFloat; }

// Calls `run` with a null pointer to the output type.
template <class Run>
__device__ __forceinline__ void with_type(DType dtype, const Run& run) {
  if (dtype == DType::f32)
    run(static_cast<float*>(nullptr));
  else if (dtype == DType::bf16)
    run(static_cast<__nv_bfloat16*>(nullptr));
  else
    run(static_cast<__half*>(nullptr));
}

// Calls `run` with the number of groups in a block of 128 k as a type.
template <class Run>
void with_groups(int group_size, const Run& run) {
  if (group_size == 128)
    run(std::integral_constant<int, 1>{});
  else if (group_size == 64)
    run(std::integral_constant<int, 2>{});
  else
    run(std::integral_constant<int, 4>{});
}

}  // namespace pycompress::weight_only
