// Arithmetic that needs an instruction of its own.
#pragma once
#include <cuda_runtime.h>

namespace pycompress::cuda {

// 2^x to 2 ulp; 0 below 2^-126 and for minus infinity, NaN for NaN.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace pycompress::cuda
