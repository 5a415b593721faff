// Small integers to pairs of 16-bit floats, exactly, with bit patterns instead of conversion instructions: an integer in the mantissa
// of a large power of two, from which that power is subtracted. Two of T in a register, the first in the lower half.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pycompress::cuda {

// a + b, for pairs.
template <class T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  T x[2], y[2];
  std::memcpy(x, &a, 4), std::memcpy(y, &b, 4);
  const T sum[2] = {T(static_cast<float>(x[0]) + static_cast<float>(y[0])), T(static_cast<float>(x[1]) + static_cast<float>(y[1]))};
  uint32_t out;
  std::memcpy(&out, sum, 4);
  return out;
#else
  uint32_t out;
  if constexpr (std::is_same_v<T, __nv_bfloat16>)  // bfloat16 has no addition before sm_90
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(0x3f803f80u), "r"(b));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
#endif
}

// Four int8 of a word.
template <class T>
__device__ __forceinline__ void widen_int8(uint32_t& low, uint32_t& high, uint32_t word) {
  word ^= 0x80808080u;  // v + 128
  if constexpr (std::is_same_v<T, __half>) {
    low = add_pairs<T>(__byte_perm(word, 0x64646464u, 0x4140), 0xe480e480u);  // 1024 + (v + 128) - 1152
    high = add_pairs<T>(__byte_perm(word, 0x64646464u, 0x4342), 0xe480e480u);
  } else {  // too many bits for this in bfloat16: through float32, of which the upper half is the bfloat16
    uint32_t wide[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      wide[i] = __float_as_uint(__uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + i)) - 8388736.0f);  // 2^23 + 128
    low = __byte_perm(wide[0], wide[1], 0x7632);
    high = __byte_perm(wide[2], wide[3], 0x7632);
  }
}

// Eight nibbles less `zero`: b[i] gets nibbles i and i + 4.
template <class T>
__device__ __forceinline__ void widen_int4(uint32_t (&b)[4], uint32_t word, uint32_t zero) {
  constexpr uint32_t kBase = std::is_same_v<T, __half> ? 0x6400u : 0x4300u;  // 1024 or 128, with steps of 1
  const uint32_t minus = (0x8000u | kBase | zero) * 0x10001u;
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i] = add_pairs<T>((word >> (4 * i) & 0x000f000fu) | kBase * 0x10001u, minus);
}

// Two float32 as three bfloat16 each that add up to them exactly, by cutting off eight bits at a time. Inf and NaN: the first part is
// Inf or NaN, the others NaN.
__device__ __forceinline__ void split_pair(uint32_t& first, uint32_t& second, uint32_t& third, float x, float y) {
  const uint32_t xs = __float_as_uint(x), ys = __float_as_uint(y);
  first = __byte_perm(xs, ys, 0x7632);
  const float x_rest = x - __uint_as_float(xs & 0xffff0000u), y_rest = y - __uint_as_float(ys & 0xffff0000u);
  const uint32_t xr = __float_as_uint(x_rest), yr = __float_as_uint(y_rest);
  second = __byte_perm(xr, yr, 0x7632);
  third = __byte_perm(__float_as_uint(x_rest - __uint_as_float(xr & 0xffff0000u)),
                      __float_as_uint(y_rest - __uint_as_float(yr & 0xffff0000u)), 0x7632);
}

}  // namespace pycompress::cuda
