// int8 product of few rows (up to 32) with all weights: the time is that of reading the weights once.
//
// Nothing passes through shared memory on the way in. A lane reads 16 bytes of a weight row and the same 16 bytes of k of its rows of A:
// four registers, which feed two mma. The instruction would have the lane's bytes come from other places of k, but a sum does not care
// about the order of its terms as long as A and B agree. The warps of a block take turns along k and add up at the end.
#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "int8_matmul/int8_epilogue.cuh"

namespace pycompress::int8_matmul {
namespace {

using namespace pycompress::cuda;

constexpr int kWarps = 8, kThreads = kWarps * 32;

// Rows in kMt slabs of 16, columns in kNt tiles of 8.
template <int kMt, int kNt, class Out>
__global__ void __launch_bounds__(kThreads) int8_gemm_few(const __grid_constant__ GemmArgs p) {
  __shared__ int32_t partial[kWarps][kMt * 16][kNt * 8];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * (kNt * 8);
  const uint4 zeros = make_uint4(0, 0, 0, 0);

  int32_t sums[kMt][kNt][4] = {};
#pragma unroll 4
  for (int64_t k = warp * 64 + lane % 4 * 16; k - lane % 4 * 16 < p.k; k += kWarps * 64) {
    const bool in_k = k < p.k;
    uint4 b[kNt], a[kMt][2];
#pragma unroll
    for (int j = 0; j < kNt; ++j) {
      const int64_t column = n0 + j * 8 + lane / 4;
      b[j] = in_k && column < p.n ? __ldcs(reinterpret_cast<const uint4*>(p.b + column * p.ldb + k)) : zeros;
    }
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = i * 16 + h * 8 + lane / 4;
        a[i][h] = in_k && row < p.m ? __ldg(reinterpret_cast<const uint4*>(p.a + row * p.lda + k)) : zeros;
      }
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int j = 0; j < kNt; ++j) {
        const uint32_t a0[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y}, a1[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
        const uint32_t b0[2] = {b[j].x, b[j].y}, b1[2] = {b[j].z, b[j].w};
        mma_s8(sums[i][j], a0, b0);
        mma_s8(sums[i][j], a1, b1);
      }
  }

#pragma unroll
  for (int i = 0; i < kMt; ++i)
#pragma unroll
    for (int j = 0; j < kNt; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) partial[warp][i * 16 + e / 2 * 8 + lane / 4][j * 8 + lane % 4 * 2 + e % 2] = sums[i][j][e];
  __syncthreads();

  Out* const out = static_cast<Out*>(p.out);
  for (int e = static_cast<int>(threadIdx.x); e < kMt * 16 * kNt * 8; e += kThreads) {
    const int row = e / (kNt * 8);
    const int64_t column = n0 + e % (kNt * 8);
    if (row >= p.m || column >= p.n) continue;
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][row][e % (kNt * 8)];
    if constexpr (std::is_same_v<Out, int32_t>) {
      out[row * p.n + column] = sum;
    } else {
      const bool zeroed = p.row_zero != nullptr;
      out[row * p.n + column] = finish<Out>(sum, p.row_scale[row], zeroed ? p.row_zero[row] : 0, p.col_scale[column],
                                            zeroed ? p.column_sum[column] : 0, p.bias ? p.bias[column] : 0.0f, p.activation);
    }
  }
}

template <int kMt, int kNt>
void run(const GemmArgs& args, const Stream& stream) {
  const char* const what = args.out_type == GemmOut::i32 ? "int8_matmul" : "int8_linear";
  const DeviceGuard guard(stream.device, what);
  if (args.m > kMt * 16) throw std::runtime_error(std::string(what) + ": too many rows for the kernel of few rows");
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(args.n, kNt * 8))), kThreads};
  with_out_type(args.out_type, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    launch(what, grid, stream.stream, int8_gemm_few<kMt, kNt, Out>, args);
  });
}

}  // namespace

void gemm_cuda_few_16x16(const GemmArgs& args, const Stream& stream) { run<1, 2>(args, stream); }
void gemm_cuda_few_16x8(const GemmArgs& args, const Stream& stream) { run<1, 1>(args, stream); }
void gemm_cuda_few_32x16(const GemmArgs& args, const Stream& stream) { run<2, 2>(args, stream); }

}  // namespace pycompress::int8_matmul
