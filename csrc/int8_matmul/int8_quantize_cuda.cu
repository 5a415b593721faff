// Rows of floats to int8, each with its own scale (and zero point): the arithmetic of pycompress/ops/affine.py.
#include <cfloat>

#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/reduce.cuh"
#include "int8_matmul/int8_linear_cuda.h"

namespace pycompress::int8_matmul {
namespace {

using namespace pycompress::cuda;

constexpr int kThreads = 256;
constexpr size_t kCacheBytes = 96 * 1024;  // fits every GPU from sm_80 on
constexpr float kSmallestAmax = 0x1p-100f;

struct RowParameters {
  float scale, inverse;
  int zero;
};

// From low = min(0, x...) and high = max(0, x...); high is infinite if the row has NaN or Inf.
__device__ RowParameters row_parameters(float low, float high, const QuantizeRowsArgs& p) {
  const bool finite = high <= FLT_MAX;
  RowParameters r{__int_as_float(0x7fc00000), 0.0f, p.dynamic ? 0 : p.x_zero_point};
  if (!p.dynamic) {
    r.inverse = 1.0f / p.x_scale;
    if (finite) r.scale = p.x_scale;
    return r;
  }
  const float amax = fmaxf(high, -low);
  if (finite) {
    r.scale = p.asymmetric ? high / 255.0f - low / 255.0f : amax / 127.0f;
    if (amax < kSmallestAmax) r.scale = 0.0f;
    if (r.scale > 0.0f) r.inverse = 1.0f / r.scale;
  }
  if (p.asymmetric) {
    const float zero = rintf(-128.0f - (finite ? low * r.inverse : 0.0f));
    r.zero = static_cast<int>(fminf(fmaxf(zero, -128.0f), 127.0f));
  }
  return r;
}

template <class T>
__device__ __forceinline__ Eight<T> load_chunk(const T* row, int64_t start, int64_t k, bool aligned) {
  if (aligned && start + 8 <= k) return load8(row + start);
  Eight<T> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.v[i] = start + i < k ? row[start + i] : from_float<T>(0.0f);
  return out;
}

// kPerRow threads per row: 32 (a warp) or 256 (the block). `cached`: the row waits in shared memory for its scale; every thread reads
// back only what it wrote, so no barrier is needed for it.
template <class T, int kPerRow>
__global__ void __launch_bounds__(kThreads) quantize_rows(const __grid_constant__ QuantizeRowsArgs p, bool aligned, bool cached) {
  __shared__ float scratch[32];
  const int lane = static_cast<int>(threadIdx.x) % kPerRow, in_block = static_cast<int>(threadIdx.x) / kPerRow;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kPerRow) + in_block;
  if (row >= p.m) return;  // a whole warp, or nobody
  const int64_t chunks = p.ldq / 8;
  const T* x = static_cast<const T*>(p.x) + row * p.ldx;
  Eight<T>* cache = dynamic_shared<Eight<T>>() + in_block * chunks;

  float low = 0.0f, high = 0.0f;
  for (int64_t c = lane; c < chunks; c += kPerRow) {
    const Eight<T> chunk = load_chunk(x, c * 8, p.k, aligned);
    if (cached) cache[c] = chunk;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float v = to_float(chunk.v[i]);
      low = fminf(low, v);
      high = fmaxf(high, fabsf(v) <= FLT_MAX ? v : __int_as_float(0x7f800000));
    }
  }
  if constexpr (kPerRow == 32) {
    low = warp_reduce(low, Min{});
    high = warp_reduce(high, Max{});
  } else {
    low = block_reduce(low, Min{}, scratch);
    high = block_reduce(high, Max{}, scratch);
  }
  const RowParameters r = row_parameters(low, high, p);
  if (lane == 0) {
    p.row_scale[row] = r.scale;
    p.row_zero[row] = r.zero;
  }

  const float smallest = static_cast<float>(p.quant_min - r.zero), largest = static_cast<float>(127 - r.zero);
  int8_t* q = p.q + row * p.ldq;
  for (int64_t c = lane; c < chunks; c += kPerRow) {
    const Eight<T> chunk = cached ? cache[c] : load_chunk(x, c * 8, p.k, aligned);
    uint32_t packed[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // fmaxf turns NaN into the bound. Clamped as a float: the conversion is always in range.
      const float rounded = fminf(fmaxf(rintf(to_float(chunk.v[i]) * r.inverse), smallest), largest);
      const int value = c * 8 + i < p.k ? static_cast<int>(rounded) + r.zero : 0;
      packed[i / 4] |= (static_cast<uint32_t>(value) & 0xffu) << (8 * (i % 4));
    }
    *reinterpret_cast<uint2*>(q + c * 8) = make_uint2(packed[0], packed[1]);
  }
}

template <class T>
void run(const QuantizeRowsArgs& args, const Stream& stream) {
  constexpr const char* kWhat = "int8_linear (quantization of rows)";
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.ldx * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  const size_t row_bytes = static_cast<size_t>(args.ldq) * sizeof(T);
  // A warp per row where rows are short; 8 KB of cache per warp keep three blocks on an SM.
  const bool warp = row_bytes <= 8 * 1024;
  const int rows = warp ? kThreads / 32 : 1;
  const bool cached = row_bytes * static_cast<size_t>(rows) <= kCacheBytes;
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(args.m, rows))), kThreads, cached ? row_bytes * static_cast<size_t>(rows) : 0};
  if (warp)
    launch(kWhat, grid, stream.stream, quantize_rows<T, 32>, args, aligned, cached);
  else
    launch(kWhat, grid, stream.stream, quantize_rows<T, kThreads>, args, aligned, cached);
}

}  // namespace

void quantize_rows_cuda(const QuantizeRowsArgs& args, const Stream& stream) {
  const DeviceGuard guard(stream.device, "int8_linear");
  switch (args.dtype) {
    case DType::f32:
      return run<float>(args, stream);
    case DType::bf16:
      return run<__nv_bfloat16>(args, stream);
    case DType::f16:
      return run<__half>(args, stream);
  }
}

}  // namespace pycompress::int8_matmul
