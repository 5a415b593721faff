// int8 GEMM on the tensor cores of sm_80 and newer: mma.sync, operands through shared memory by cp.async in kStages stages.
//
// A stage holds 64 bytes of k of every row of the tile. Its 16-byte chunks are swizzled so that ldmatrix finds the eight rows of a
// matrix in eight different bank groups: A by (row / 2) % 4, B by (row / 8) % 4. B's rule is another one because the columns of an mma
// tile are not neighbours: within 32 columns, column c of tile j is column (c / 2) * 8 + j * 2 + c % 2. So a thread ends up with eight
// neighbouring outputs of a row and writes them at once.
#pragma once
#include "core/cuda/async_copy.cuh"
#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "int8_matmul/int8_epilogue.cuh"

namespace pycompress::int8_matmul {

constexpr int kStageK = 64;

template <int kBm_, int kBn_, int kWm_, int kWn_, int kStages_, int kBlocksPerSm_>
struct Tile {
  static constexpr int kBm = kBm_, kBn = kBn_, kWm = kWm_, kWn = kWn_, kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = (kBm / kWm) * (kBn / kWn) * 32;
  static constexpr int kStageBytes = (kBm + kBn) * kStageK;
  static_assert(kWm % 16 == 0 && kWn % 32 == 0 && kBm % (kThreads / 4) == 0 && kBn % (kThreads / 4) == 0 && kThreads % 128 == 0);
  static_assert(kStages * kStageBytes <= 99 * 1024, "more shared memory than an sm_86 has");
};

template <class T, class Out>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    int8_gemm(const __grid_constant__ GemmArgs p, int64_t tiles_m, int64_t tiles_n, bool aligned_out) {
  using namespace pycompress::cuda;
  constexpr int kRows = T::kThreads / 4;  // rows that one round of copies covers
  constexpr int kMt = T::kWm / 16, kNt = T::kWn / 8;
  int8_t* const shared = dynamic_shared<int8_t>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warp_m = warp % (T::kBm / T::kWm) * T::kWm, warp_n = warp / (T::kBm / T::kWm) * T::kWn;

  // Eight tiles of rows at a time share their columns' weights in the L2 cache.
  constexpr int64_t kGroup = 8;
  const int64_t in_group = kGroup * tiles_n, group = blockIdx.x / in_group, rest = blockIdx.x % in_group;
  const int64_t height = tiles_m - group * kGroup < kGroup ? tiles_m - group * kGroup : kGroup;
  const int64_t m0 = (group * kGroup + rest % height) * T::kBm, n0 = rest / height * T::kBn;

  const int copy_row = thread / 4, copy_chunk = thread % 4;
  const int8_t* const a_from = p.a + (m0 + copy_row) * p.lda + copy_chunk * 16;
  const int8_t* const b_from = p.b + (n0 + copy_row) * p.ldb + copy_chunk * 16;
  const int a_to = copy_row * kStageK + (copy_chunk ^ (copy_row / 2 % 4)) * 16;
  const int b_to = T::kBm * kStageK + copy_row * kStageK + (copy_chunk ^ (copy_row / 8 % 4)) * 16;
  const auto copy_stage = [&](int64_t k0, int slot) {
    int8_t* const stage = shared + slot * T::kStageBytes;
    const bool in_k = k0 + copy_chunk * 16 < p.k;
#pragma unroll
    for (int i = 0; i < T::kBm / kRows; ++i)
      async_copy16(stage + a_to + i * kRows * kStageK, a_from + i * kRows * p.lda + k0, in_k && m0 + copy_row + i * kRows < p.m);
#pragma unroll
    for (int i = 0; i < T::kBn / kRows; ++i)
      async_copy16(stage + b_to + i * kRows * kStageK, b_from + i * kRows * p.ldb + k0, in_k && n0 + copy_row + i * kRows < p.n);
  };

  // ldmatrix: lane i names row i % 16 of a 16-row slab of A at chunk i / 16, and for a pair of B tiles (j, j + 1) column i % 8 of tile
  // j + i / 16 at chunk i / 8 % 2.
  const int a_row = warp_m + lane % 16, a_swizzle = a_row / 2 % 4;
  const int b_row = warp_n + lane % 8 / 2 * 8 + lane / 16 * 2 + lane % 2, b_swizzle = b_row / 8 % 4;

  int32_t sums[kMt][kNt][4] = {};
  const int64_t steps = (p.k + kStageK - 1) / kStageK;
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (s < steps) copy_stage(static_cast<int64_t>(s) * kStageK, s);
    async_commit();
  }
  int slot = 0;
  for (int64_t step = 0; step < steps; ++step) {
    async_wait<T::kStages - 2>();
    __syncthreads();  // everybody's part of this stage is there, and nobody reads the one that is overwritten next
    const int64_t ahead = step + T::kStages - 1;
    if (ahead < steps) copy_stage(ahead * kStageK, slot == 0 ? T::kStages - 1 : slot - 1);
    async_commit();  // also an empty group: the count in async_wait stays right
    const int8_t* const a_stage = shared + slot * T::kStageBytes + a_row * kStageK;
    const int8_t* const b_stage = shared + slot * T::kStageBytes + (T::kBm + b_row) * kStageK;
#pragma unroll
    for (int half = 0; half < kStageK / 32; ++half) {
      uint32_t a[kMt][4], b[kNt][2];
#pragma unroll
      for (int i = 0; i < kMt; ++i) ldmatrix_x4(a[i], a_stage + i * 16 * kStageK + ((half * 2 + lane / 16) ^ a_swizzle) * 16);
#pragma unroll
      for (int j = 0; j < kNt; j += 2) {
        uint32_t pair[4];
        ldmatrix_x4(pair, b_stage + (j / 4 * 32 + j % 4 * 2) * kStageK + ((half * 2 + lane / 8 % 2) ^ b_swizzle) * 16);
        b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
      }
#pragma unroll
      for (int i = 0; i < kMt; ++i)
#pragma unroll
        for (int j = 0; j < kNt; ++j) mma_s8(sums[i][j], a[i], b[j]);
    }
    slot = slot + 1 == T::kStages ? 0 : slot + 1;
  }
  async_wait<0>();

  Out* const out = static_cast<Out*>(p.out);
#pragma unroll
  for (int j = 0; j < kNt; j += 4) {
    const int64_t column = n0 + warp_n + j * 8 + lane % 4 * 8;
    const int columns = p.n - column < 8 ? static_cast<int>(p.n - column) : 8;  // of these eight; none if not positive
    float col_scale[8] = {}, bias[8] = {};
    int32_t column_sum[8] = {};
    if constexpr (!std::is_same_v<Out, int32_t>) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (c >= columns) continue;
        col_scale[c] = __ldg(p.col_scale + column + c);
        if (p.bias) bias[c] = __ldg(p.bias + column + c);
        if (p.row_zero) column_sum[c] = __ldg(p.column_sum + column + c);
      }
    }
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = m0 + warp_m + i * 16 + h * 8 + lane / 4;
        if (row >= p.m) continue;
        float row_scale = 0.0f;
        int32_t zero = 0;
        if constexpr (!std::is_same_v<Out, int32_t>) {
          row_scale = __ldg(p.row_scale + row);
          if (p.row_zero) zero = __ldg(p.row_zero + row);
        }
        Eight<Out> values;
#pragma unroll
        for (int c = 0; c < 8; ++c)
          values.v[c] = finish<Out>(sums[i][j + c / 2][h * 2 + c % 2], row_scale, zero, col_scale[c], column_sum[c], bias[c], p.activation);
        Out* const to = out + row * p.n + column;
        if (aligned_out && columns == 8) {
          store8(to, values);
        } else {
#pragma unroll
          for (int c = 0; c < 8; ++c)
            if (c < columns) to[c] = values.v[c];
        }
      }
  }
}

template <class T>
void launch_gemm(const GemmArgs& args, const cuda::Stream& stream) {
  const char* const what = args.out_type == GemmOut::i32 ? "int8_matmul" : "int8_linear";
  const cuda::DeviceGuard guard(stream.device, what);
  const int64_t tiles_m = ceil_div(args.m, T::kBm), tiles_n = ceil_div(args.n, T::kBn);
  const cuda::Grid grid{dim3(static_cast<unsigned>(tiles_m * tiles_n)), T::kThreads, T::kStages * T::kStageBytes};
  with_out_type(args.out_type, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    const bool aligned = reinterpret_cast<uintptr_t>(args.out) % 16 == 0 && args.n * static_cast<int64_t>(sizeof(Out)) % 16 == 0;
    cuda::launch(what, grid, stream.stream, int8_gemm<T, Out>, args, tiles_m, tiles_n, aligned);
  });
}

}  // namespace pycompress::int8_matmul
