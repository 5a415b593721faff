// A packed 2:4 or 1:4 float32 weight as dense rows, for the library's product and for gradients.
#include "core/cuda/launch.cuh"
#include "sparse24_gemm/float_chunk.cuh"
#include "sparse24_gemm/sparse24_cuda.h"

namespace pycompress::sparse24_gemm {
namespace {

using namespace pycompress::cuda;

constexpr int kThreads = 256;

template <int kPer>
__global__ void __launch_bounds__(kThreads) float_dense(const __grid_constant__ FloatWeight weight, float* out, int64_t ldo) {
  constexpr int kGroups = 4 / kPer;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = at / weight.chunks, chunk = at % weight.chunks;
  if (row >= weight.n) return;
  const float4 values = __ldcs(reinterpret_cast<const float4*>(weight.values) + at);
  const uint32_t places = __ldcs(weight.indices + at);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t k = (chunk * kGroups + group) * 4;
    float w[4];
    expand_group<kPer>(w, values, places, group);
    if (k < ldo) *reinterpret_cast<float4*>(out + row * ldo + k) = make_float4(w[0], w[1], w[2], w[3]);
  }
}

}  // namespace

void float_dense_cuda(const FloatWeight& weight, float* out, int64_t ldo, const Stream& stream) {
  constexpr const char* kWhat = "sparse24_linear (dense weight)";
  const DeviceGuard guard(stream.device, kWhat);
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(weight.n * weight.chunks, kThreads))), kThreads};
  if (weight.per_group == 2)
    launch(kWhat, grid, stream.stream, float_dense<2>, weight, out, ldo);
  else
    launch(kWhat, grid, stream.stream, float_dense<1>, weight, out, ldo);
}

}  // namespace pycompress::sparse24_gemm
