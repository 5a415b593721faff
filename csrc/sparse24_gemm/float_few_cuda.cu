// Few rows of float32 times a 2:4 or 1:4 weight.
//
// A lane takes a chunk of four values, of four channels at once, so that a value of x serves four fma per read; the lanes and warps of a
// block take turns along k and add up at the end. Values become dense in registers (a comparison each), because choosing among the four
// values of x would cost more as soon as there are two rows.
#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/reduce.cuh"
#include "sparse24_gemm/float_chunk.cuh"
#include "sparse24_gemm/sparse24_cuda.h"

namespace pycompress::sparse24_gemm {
namespace {

using namespace pycompress::cuda;

constexpr int kWarps = 4, kThreads = kWarps * 32, kColumns = 4;

template <int kPer, int kRows>
__global__ void __launch_bounds__(kThreads) float_few(const __grid_constant__ FloatArgs p, unsigned slabs) {
  constexpr int kGroups = 4 / kPer;  // of a chunk
  __shared__ float partial[kWarps][kRows][kColumns];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  // Blocks that share weights are neighbours.
  const int64_t m0 = blockIdx.x % slabs * kRows, n0 = static_cast<int64_t>(blockIdx.x / slabs) * kColumns;
  const FloatWeight& weight = p.weight;

  float sums[kRows][kColumns] = {};
  for (int64_t chunk = thread; chunk < weight.chunks; chunk += kThreads) {
    float4 values[kColumns];
    uint32_t places[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t at = (n0 + c) * weight.chunks + chunk;
      const bool valid = n0 + c < weight.n;
      values[c] = valid ? __ldcs(reinterpret_cast<const float4*>(weight.values) + at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      places[c] = valid ? __ldcs(weight.indices + at) : 0u;
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float w[kColumns][4];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) expand_group<kPer>(w[c], values[c], places[c], group);
      const int64_t k = (chunk * kGroups + group) * 4;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 x = m0 + r < p.m && k < weight.k ? __ldg(reinterpret_cast<const float4*>(p.x + (m0 + r) * p.ldx + k))
                                                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          sums[r][c] = fmaf(w[c][3], x.w, fmaf(w[c][2], x.z, fmaf(w[c][1], x.y, fmaf(w[c][0], x.x, sums[r][c]))));
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float sum = warp_reduce(sums[r][c], Sum{});
      if (lane == 0) partial[warp][r][c] = sum;
    }
  __syncthreads();
  const int64_t row = m0 + thread / kColumns, column = n0 + thread % kColumns;
  if (thread >= kRows * kColumns || row >= p.m || column >= weight.n) return;
  float y = p.bias ? __ldg(p.bias + column) : 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) y += partial[w][thread / kColumns][thread % kColumns];
  p.out[row * weight.n + column] = activate(y, p.activation);
}

template <int kPer, int kRows>
void run(const FloatArgs& args, const Stream& stream) {
  const int64_t slabs = ceil_div(args.m, kRows);
  const Grid grid{dim3(static_cast<unsigned>(slabs * ceil_div(args.weight.n, kColumns))), kThreads};
  launch("sparse24_linear", grid, stream.stream, float_few<kPer, kRows>, args, static_cast<unsigned>(slabs));
}

template <int kPer>
void run_rows(const FloatArgs& args, const Stream& stream) {
  if (args.m <= 1) return run<kPer, 1>(args, stream);
  if (args.m <= 2) return run<kPer, 2>(args, stream);
  if (args.m <= 4) return run<kPer, 4>(args, stream);
  run<kPer, 8>(args, stream);
}

}  // namespace

void float_few_cuda(const FloatArgs& args, const Stream& stream) {
  const DeviceGuard guard(stream.device, "sparse24_linear");
  if (args.weight.per_group == 2)
    run_rows<2>(args, stream);
  else
    run_rows<1>(args, stream);
}

}  // namespace pycompress::sparse24_gemm
