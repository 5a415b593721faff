// How an int32 sum leaves a kernel: out = act(float(sum - zero * column_sum) * (row_scale * col_scale) + bias), one fma.
#pragma once
#include <type_traits>

#include "core/cuda/convert.cuh"
#include "int8_matmul/int8_linear_cuda.h"

namespace pycompress::int8_matmul {

// Before the activation.
__device__ __forceinline__ float scaled(int32_t sum, float row_scale, int32_t zero, float col_scale, int32_t column_sum, float bias) {
  // Wrapping: only the difference is certain to fit.
  sum = static_cast<int32_t>(static_cast<uint32_t>(sum) - static_cast<uint32_t>(zero) * static_cast<uint32_t>(column_sum));
  return fmaf(static_cast<float>(sum), row_scale * col_scale, bias);
}

template <class Out>
__device__ __forceinline__ Out finish(int32_t sum, float row_scale, int32_t zero, float col_scale, int32_t column_sum, float bias,
                                      Activation activation) {
  if constexpr (std::is_same_v<Out, int32_t>) {
    return sum;
  } else {
    return cuda::from_float<Out>(cuda::activate(scaled(sum, row_scale, zero, col_scale, column_sum, bias), activation));
  }
}

// Calls `run` with a null pointer to the output type.
template <class Run>
void with_out_type(GemmOut type, const Run& run) {
  switch (type) {
    case GemmOut::f32:
      return run(static_cast<float*>(nullptr));
    case GemmOut::bf16:
      return run(static_cast<__nv_bfloat16*>(nullptr));
    case GemmOut::f16:
      return run(static_cast<__half*>(nullptr));
    case GemmOut::i32:
      return run(static_cast<int32_t*>(nullptr));
  }
}

}  // namespace pycompress::int8_matmul
