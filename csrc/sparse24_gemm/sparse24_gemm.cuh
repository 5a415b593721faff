// The kernel behind sparse24_cuda.h: mma.sp, operands through shared memory by cp.async in kStages stages.
#pragma once
#include "core/cuda/async_copy.cuh"
#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma_sparse.cuh"
#include "sparse24_gemm/sparse24_cuda.h"

namespace pycompress::sparse24_gemm {

// bn x bm: channels and tokens of a block. A warp computes 64 channels of wm tokens. `split` groups of warps take turns along k.
template <int bn, int bm, int wm, int split, int steps, int stages, int resident>
struct Tile {
  static constexpr int kBn = bn, kBm = bm, kWm = wm, kSplit = split, kSteps = steps, kStages = stages, kResident = resident;
  static constexpr int kWarps = bn / 64 * (bm / wm) * split, kThreads = 32 * kWarps;
  static_assert(bn % 64 == 0 && bm % wm == 0 && wm % 8 == 0 && steps % split == 0 && (steps == 2 || steps % 4 == 0));
};

template <class T>
constexpr int kMetaWords = std::is_same_v<T, int8_t> ? 128 : 64;  // of 64 channels and one step

template <class T, class Tl>
constexpr int kStageBytes = Tl::kSteps * (64 * Tl::kBm + 32 * Tl::kBn + Tl::kBn / 64 * kMetaWords<T> * 4);

// Where 16-byte chunk `chunk` of row `row` lies: eight rows at one chunk are in eight bank groups.
template <int row_bytes>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int kChunks = row_bytes / 16;
  return row * row_bytes + (kChunks == 4 ? chunk ^ (row / 2 % 4) : chunk ^ (row % 8)) * 16;
}

template <class T, class Out, class Accumulator>
__device__ __forceinline__ Out finish(Accumulator sum, float row_scale, float col_scale, float bias, Activation activation) {
  float y;
  if constexpr (std::is_same_v<T, int8_t>)
    y = fmaf(static_cast<float>(sum), row_scale * col_scale, bias);
  else
    y = sum + bias;
  return cuda::from_float<Out>(cuda::activate(y, activation));
}

template <class T, class Out, class Tl>
__global__ void __launch_bounds__(Tl::kThreads, Tl::kResident)
    sparse_gemm(const __grid_constant__ CudaArgs p, int64_t tiles_m, bool aligned_out) {
  using namespace pycompress::cuda;
  using Accumulator = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  constexpr int kXRow = 64 * Tl::kSteps, kWRow = 32 * Tl::kSteps, kMeta = kMetaWords<T>, kNt = Tl::kWm / 8;
  constexpr int kXBytes = kXRow * Tl::kBm, kWBytes = kWRow * Tl::kBn, kGroups = Tl::kBn / 64, kStage = kStageBytes<T, Tl>;
  char* const shared = dynamic_shared<char>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int group = warp % kGroups, warp_m = warp / kGroups % (Tl::kBm / Tl::kWm) * Tl::kWm, turn = warp / (kGroups * (Tl::kBm / Tl::kWm));
  const int64_t m0 = blockIdx.x % tiles_m * Tl::kBm, n0 = blockIdx.x / tiles_m * Tl::kBn;

  // A thread copies one chunk of every kXRows-th row of x, and of every kWRows-th channel.
  constexpr int kXChunks = kXRow / 16, kXRows = Tl::kThreads / kXChunks, kWChunks = kWRow / 16, kWRows = Tl::kThreads / kWChunks;
  static_assert(kXRows % 8 == 0 && Tl::kBm % kXRows == 0 && Tl::kBn % kWRows == 0);
  const int x_row = thread / kXChunks, x_chunk = thread % kXChunks, w_row = thread / kWChunks, w_chunk = thread % kWChunks;
  const int rows_left = p.m - m0 < Tl::kBm ? static_cast<int>(p.m - m0) : Tl::kBm;
  const int64_t x_step = kXRows * p.ldx, w_step = kWRows * p.steps * 32;
  const char* const x_from = static_cast<const char*>(p.x) + (m0 + x_row) * p.ldx + x_chunk * 16;
  const char* const w_from = static_cast<const char*>(p.values) + (n0 + w_row) * p.steps * 32 + w_chunk * 16;
  const uint32_t* const meta_from = p.meta + n0 / 64 * kMeta;
  const int64_t meta_step = p.n_padded / 64 * kMeta;
  const int steps = static_cast<int>(p.steps);
  const auto copy_stage = [&](int first, int slot) {
    char* const stage = shared + slot * kStage;
    const bool x_in = first * 64 + x_chunk * 16 < static_cast<int>(p.x_bytes), w_in = first * 2 + w_chunk < steps * 2;
    const char* from = x_from + first * 64;
    char* to = stage + swizzled<kXRow>(x_row, x_chunk);
#pragma unroll
    for (int i = 0; i < Tl::kBm / kXRows; ++i, from += x_step, to += kXRows * kXRow)
      async_copy16(to, from, x_in && x_row + i * kXRows < rows_left);
    from = w_from + first * 32;
#pragma unroll
    for (int i = 0; i < Tl::kBn / kWRows; ++i, from += w_step) {
      const int channel = w_row + i * kWRows;
      const int row = channel / 64 * 64 + channel % 8 * 8 + channel % 64 / 8;  // 8 rows of a matrix are neighbours here
      async_copy16(stage + kXBytes + swizzled<kWRow>(row, w_chunk), from, w_in);
    }
    constexpr int kMetaChunks = kGroups * kMeta / 4;
#pragma unroll
    for (int i = thread; i < Tl::kSteps * kMetaChunks; i += Tl::kThreads) {
      const int step = first + i / kMetaChunks;
      async_copy16(stage + kXBytes + kWBytes + i * 16, meta_from + step * meta_step + i % kMetaChunks * 4, step < steps);
    }
  };

  Accumulator sums[4][kNt][4] = {};
  const int all = (steps + Tl::kSteps - 1) / Tl::kSteps;
#pragma unroll
  for (int s = 0; s < Tl::kStages - 1; ++s) {
    if (s < all) copy_stage(s * Tl::kSteps, s);
    async_commit();
  }
  int slot = 0;
  for (int stage_index = 0; stage_index < all; ++stage_index) {
    async_wait<Tl::kStages - 2>();
    __syncthreads();  // everybody's part of this stage is there, and nobody reads the one that is overwritten next
    const int ahead = stage_index + Tl::kStages - 1;
    if (ahead < all) copy_stage(ahead * Tl::kSteps, slot == 0 ? Tl::kStages - 1 : slot - 1);
    async_commit();  // also an empty group: the count in async_wait stays right
    const char* const x = shared + slot * kStage;
    const char* const w = x + kXBytes;
    const uint32_t* const meta = reinterpret_cast<const uint32_t*>(w + kWBytes);
#pragma unroll
    for (int own = 0; own < Tl::kSteps / Tl::kSplit; ++own) {
      const int step = own * Tl::kSplit + turn;
      if (stage_index * Tl::kSteps + step >= steps) continue;  // the whole warp
      uint32_t b[kNt][4];
#pragma unroll
      for (int j = 0; j < kNt; ++j) ldmatrix_x4(b[j], x + swizzled<kXRow>(warp_m + j * 8 + lane % 8, step * 4 + lane / 8));
      uint32_t e = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, w + swizzled<kWRow>(group * 64 + i * 16 + lane % 16, step * 2 + lane / 16));
        const uint32_t* const words = meta + (step * kGroups + group) * kMeta + lane;
        if constexpr (std::is_same_v<T, int8_t>) {
          e = words[i * 32];
        } else if (i % 2 == 0) {
          e = words[i / 2 * 32];
        }
#pragma unroll
        for (int j = 0; j < kNt; ++j) {
          if (std::is_same_v<T, int8_t> || i % 2 == 0)
            mma_sparse<T, 0>(sums[i][j], a, b[j], e);
          else
            mma_sparse<T, std::is_same_v<T, int8_t> ? 0 : 1>(sums[i][j], a, b[j], e);
        }
      }
    }
    slot = slot + 1 == Tl::kStages ? 0 : slot + 1;
  }
  async_wait<0>();

  if constexpr (Tl::kSplit > 1) {
    constexpr int kValues = 16 * kNt;
    Accumulator* const partial = reinterpret_cast<Accumulator*>(shared);
    const int place = warp % (Tl::kWarps / Tl::kSplit) * 32 + lane, places = Tl::kWarps / Tl::kSplit * 32;
    __syncthreads();  // the stages have been read
    if (turn > 0) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) partial[((turn - 1) * kValues + v) * places + place] = sums[v / (4 * kNt)][v / 4 % kNt][v % 4];
    }
    __syncthreads();
    if (turn > 0) return;
#pragma unroll
    for (int other = 0; other < Tl::kSplit - 1; ++other)
#pragma unroll
      for (int v = 0; v < kValues; ++v) sums[v / (4 * kNt)][v / 4 % kNt][v % 4] += partial[(other * kValues + v) * places + place];
  }

  const int64_t channel = n0 + group * 64 + lane / 4 * 8;
  const int channels = p.n - channel < 8 ? static_cast<int>(p.n - channel) : 8;  // of these eight; none if not positive
  Out* const out = static_cast<Out*>(p.out);
#pragma unroll
  for (int j = 0; j < kNt; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t token = m0 + warp_m + j * 8 + lane % 4 * 2 + h;
      if (token >= p.m) continue;
      float row_scale = 0.0f;
      if constexpr (std::is_same_v<T, int8_t>) row_scale = __ldg(p.row_scale + token);
      Eight<Out> values;
#pragma unroll
      for (int c = 0; c < 8; ++c) {  // scales and bias come from the cache: registers are short
        float col_scale = 0.0f, bias = 0.0f;
        if (c < channels) {
          if constexpr (std::is_same_v<T, int8_t>) col_scale = __ldg(p.col_scale + channel + c);
          if (p.bias) bias = __ldg(p.bias + channel + c);
        }
        values.v[c] = finish<T, Out>(sums[c / 2][j][c % 2 * 2 + h], row_scale, col_scale, bias, p.activation);
      }
      Out* const to = out + token * p.n + channel;
      if (aligned_out && channels == 8) {
        store8(to, values);
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c)
          if (c < channels) to[c] = values.v[c];
      }
    }
}

template <class T, class Out, class Tl>
void launch_gemm(const CudaArgs& args, const cuda::Stream& stream) {
  const char* const what = std::is_same_v<T, int8_t> ? "int8_sparse24_linear" : "sparse24_linear";
  const cuda::DeviceGuard guard(stream.device, what);
  const int64_t tiles_m = ceil_div(args.m, Tl::kBm), tiles_n = ceil_div(args.n, Tl::kBn);
  const bool aligned = reinterpret_cast<uintptr_t>(args.out) % 16 == 0 && args.n * static_cast<int64_t>(sizeof(Out)) % 16 == 0;
  const cuda::Grid grid{dim3(static_cast<unsigned>(tiles_m * tiles_n)), Tl::kThreads,
                        static_cast<size_t>(Tl::kStages) * kStageBytes<T, Tl>};
  cuda::launch(what, grid, stream.stream, sparse_gemm<T, Out, Tl>, args, tiles_m, aligned);
}

using Tile128x128 = Tile<128, 128, 32, 1, 2, 3, 1>;
using Tile64x64 = Tile<64, 64, 16, 1, 2, 4, 2>;
using TileFew = Tile<64, 16, 16, 4, 4, 4, 3>;

template <class T, class Out>
void launch_config(int config, const CudaArgs& args, const cuda::Stream& stream) {
  if (config == 0)
    launch_gemm<T, Out, Tile128x128>(args, stream);
  else if (config == 1)
    launch_gemm<T, Out, Tile64x64>(args, stream);
  else
    launch_gemm<T, Out, TileFew>(args, stream);
}

// sparse24_gemm_hopper.cuh; only on compute capability 9.0.
void run_hopper_i8(const CudaArgs& args, const cuda::Stream& stream);
void run_hopper_bf16(const CudaArgs& args, const cuda::Stream& stream);
void run_hopper_f16(const CudaArgs& args, const cuda::Stream& stream);

void run_i8(int config, const CudaArgs& args, const cuda::Stream& stream);
void run_bf16(int config, const CudaArgs& args, const cuda::Stream& stream);
void run_f16(int config, const CudaArgs& args, const cuda::Stream& stream);

}  // namespace pycompress::sparse24_gemm
