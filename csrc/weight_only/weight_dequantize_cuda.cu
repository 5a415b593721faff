// Packed weights to dense rows of float32, bfloat16 or float16, for the library's product.
#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "weight_only/weight_only_cuda.h"

namespace pycompress::weight_only {
namespace {

using namespace pycompress::cuda;

constexpr int kThreads = 256;

// A thread per eight values, in the order in which they lie in the packed weight.
template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_weight(const __grid_constant__ Weight w, T* out, int64_t ldo, int64_t per_row) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = i / per_row, chunk = i % per_row;
  if (row >= w.n) return;
  Eight<T> values;
  int64_t k;
  if (w.group_size == 0) {
    k = chunk * 8;
    const uint2 bytes = __ldcs(reinterpret_cast<const uint2*>(w.data + row * w.ldw + k));
    const float scale = __ldg(w.scale + row);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int value = static_cast<int8_t>((e < 4 ? bytes.x : bytes.y) >> (8 * (e % 4)));
      values.v[e] = from_float<T>(static_cast<float>(value) * scale);
    }
  } else {
    k = chunk / 16 * 128 + chunk % 4 * 32 + chunk / 4 % 4 * 8;
    const uint32_t word = __ldcs(reinterpret_cast<const unsigned*>(w.data + row * w.ldw + chunk * 4));
    const int64_t at = k / w.group_size * w.ldn + row;
    const float scale = __ldg(w.scale + at);
    const int zero = w.zero ? __ldg(w.zero + at) : 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int u = static_cast<int>(word >> (e / 2 * 4 + e % 2 * 16) & 15u);
      values.v[e] = from_float<T>(static_cast<float>(u - zero) * scale);
    }
  }
  if (k < ldo) store8(out + row * ldo + k, values);
}

template <class T>
void run(const Weight& weight, T* out, int64_t ldo, const Stream& stream) {
  const int64_t per_row = weight.ldw / (weight.group_size == 0 ? 8 : 4);
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(weight.n * per_row, kThreads))), kThreads};
  launch("dequantize", grid, stream.stream, dequantize_weight<T>, weight, out, ldo, per_row);
}

}  // namespace

void dequantize_cuda(const Weight& weight, DType dtype, void* out, int64_t ldo, const Stream& stream) {
  const DeviceGuard guard(stream.device, "dequantize");
  switch (dtype) {
    case DType::f32:
      return run(weight, static_cast<float*>(out), ldo, stream);
    case DType::bf16:
      return run(weight, static_cast<__nv_bfloat16*>(out), ldo, stream);
    case DType::f16:
      return run(weight, static_cast<__half*>(out), ldo, stream);
  }
}

}  // namespace pycompress::weight_only
