// The kernel behind sparse24_cuda.h with Hopper's own instructions (sm_90a): sparse wgmma on operands that the copy engine brings,
// warpgroups with roles as in int8_matmul/int8_gemm_hopper.cuh.
//
// A block computes 128 channels of 256 tokens at a time; two consumer warpgroups have 64 channels each. A stage is two steps: 64 bytes of
// kept values per channel, 128 bytes of k per token, and the metadata. In a cluster of two the blocks have neighbouring channels of the
// same tokens: each fetches half of the tokens for both.
//
// The packed form is the one of mma.sp. Of 16 channels, the row g + 8 h of an instruction is channel 2 g + h here: a thread has two
// neighbouring channels of a token, and eight lanes write 16 of them at once. The tensor map of the values puts the rows in that order; the
// metadata's words are looked up where the other order has them.
#pragma once
#include "core/cuda/launch.cuh"
#include "core/cuda/tensor_map.cuh"
#include "core/cuda/tile_order.cuh"
#include "core/cuda/wgmma.cuh"
#include "sparse24_gemm/sparse24_gemm.cuh"

namespace pycompress::sparse24_gemm {

template <class T>
struct Hopper {
  static constexpr int kChannels = 128, kTokens = 256, kCluster = 2, kSteps = 2, kStages = 5, kConsumers = 256, kThreads = kConsumers + 128;
  static constexpr int kValueRow = 32 * kSteps, kValueBytes = kChannels * kValueRow, kTokenBytes = kTokens * cuda::kBoxBytes;
  static constexpr int kWords = kChannels / 64 * kMetaWords<T>, kMetaBytes = 4 * kSteps * kWords;  // words of a step
  static constexpr int kStageBytes = kValueBytes + kTokenBytes + 2048;
  static constexpr int kScalesAt = kStages * kStageBytes, kBarriersAt = kScalesAt + 2 * kTokens * 4;
  static constexpr int kSharedBytes = kBarriersAt + 2 * kStages * static_cast<int>(sizeof(cuda::Barrier));
  static constexpr int kPeriod = 8;  // clusters of channels, 2048 of them, that share their tokens in the L2 cache
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(64 * kSteps == cuda::kBoxBytes && kValueRow == 64 && kMetaBytes <= 2048 && kSharedBytes <= 227 * 1024);
};

struct HopperArgs {
  CUtensorMap values, tokens, meta;
  CudaArgs gemm;
  int clusters_n, tiles_m, stages;  // stages: how many along k
  bool vector_out;                  // rows of the output start at multiples of two values
};

// Two neighbouring channels of a token.
template <class Out>
struct alignas(2 * sizeof(Out)) Two {
  Out v[2];
};

// Writes this thread's channels, two from `channel` on, of its tokens: two from `token` on, and so on every eight.
template <class T, class Out, bool kActivate, class Sum, int kSums>
__device__ __forceinline__ void write_tile(const CudaArgs& p, const Sum (&sums)[kSums], int64_t token, int64_t channel,
                                           const float* row_scale, const float (&col_scale)[2], const float (&bias)[2], bool vector) {
  Out* to = static_cast<Out*>(p.out) + token * p.n + channel;
#pragma unroll
  for (int j = 0; j < kSums / 4; ++j) {
    float y[2][2];  // tokens, channels
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Sum sum = sums[4 * j + 2 * h + c];
        if constexpr (std::is_same_v<T, int8_t>)
          y[c][h] = fmaf(static_cast<float>(sum), row_scale[8 * j + c] * col_scale[h], bias[h]);
        else
          y[c][h] = sum + bias[h];
      }
    if constexpr (kActivate) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i / 2][i % 2] = cuda::activate(y[i / 2][i % 2], p.activation);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (token + 8 * j + c >= p.m) continue;
      const Two<Out> two{{cuda::from_float<Out>(y[c][0]), cuda::from_float<Out>(y[c][1])}};
      if (vector) {
        *reinterpret_cast<Two<Out>*>(to + c * p.n) = two;
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (channel + h < p.n) to[c * p.n + h] = two.v[h];
      }
    }
    to += 8 * p.n;
  }
}

template <class T, class Out>
__global__ void __launch_bounds__(Hopper<T>::kThreads, 1) sparse_gemm_hopper(const __grid_constant__ HopperArgs p) {
  using namespace pycompress::cuda;
  using H = Hopper<T>;
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  constexpr bool kSmall = std::is_same_v<T, int8_t>;
  char* const shared = dynamic_shared<char>();
  float* const scales = reinterpret_cast<float*>(shared + H::kScalesAt);
  Barrier* const full = reinterpret_cast<Barrier*>(shared + H::kBarriersAt);
  Barrier* const empty = full + H::kStages;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const unsigned rank = cluster_rank();
  const int tiles = p.clusters_n * p.tiles_m, first = static_cast<int>(blockIdx.x) / H::kCluster,
            stride = static_cast<int>(gridDim.x) / H::kCluster;

  if (thread == 0) {
    for (int s = 0; s < H::kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, H::kConsumers / 32 * H::kCluster);  // every consuming warp of both blocks
    }
    barrier_init_fence();
  }
  cluster_barrier();

  if (thread >= H::kConsumers) {
    give_registers_back<H::kProducerRegisters>();
    if (thread == H::kConsumers && p.stages > 0) {
      prefetch_tensor_map(&p.values);
      prefetch_tensor_map(&p.tokens);
      prefetch_tensor_map(&p.meta);
      constexpr int kHalf = H::kTokens / H::kCluster;
      Turn<H::kStages> turn;
      for (int tile = first; tile < tiles; tile += stride) {
        const TilePlace at = tile_place(tile, p.clusters_n, p.tiles_m, H::kPeriod);
        const int n0 = (at.cluster * H::kCluster + static_cast<int>(rank)) * H::kChannels;
        const int own = static_cast<int>(rank) * kHalf, m0 = at.tile * H::kTokens + own;
        for (int s = 0; s < p.stages; ++s, turn.next()) {
          barrier_wait(empty + turn.stage, turn.parity ^ 1);
          Barrier* const bar = full + turn.stage;
          char* const stage = shared + turn.stage * H::kStageBytes;
          barrier_arrive_expect(bar, H::kValueBytes + H::kTokenBytes + H::kMetaBytes);
          copy_box(stage, &p.values, bar, s * H::kValueRow, 0, 0, n0 / 16);
          copy_box<true>(stage + H::kValueBytes + own * kBoxBytes, &p.tokens, bar, s * kBoxBytes, m0, (1u << H::kCluster) - 1);
          copy_box<false>(stage + H::kValueBytes + H::kTokenBytes, &p.meta, bar, n0 / 64 * kMetaWords<T>, s * H::kSteps);
        }
      }
    }
  } else {
    take_registers<H::kConsumerRegisters>();
    const int group = __shfl_sync(0xffffffffu, warp / 4, 0);  // the same in all lanes, which the compiler then knows
    const int g = lane / 4, t = lane % 4, w = warp % 4;
    const uint64_t a_operand = wgmma_operand<H::kValueRow>(shared + group * 64 * H::kValueRow);
    const uint64_t b_operand = wgmma_operand(shared + H::kValueBytes);
    // Channels 16 w + 2 g + h of 64 are rows of tile g % 4 of mma.sp, in the lanes of 2 w + g / 4.
    const int word =
        kSmall ? group * 128 + g % 4 * 32 + (2 * w + g / 4) * 4 + t : group * 64 + g % 4 / 2 * 32 + (2 * w + g / 4) * 4 + g % 2 * 2 + t % 2;
    const auto release = [&](int stage) {
      if (lane < H::kCluster) barrier_arrive_at(empty + stage, static_cast<unsigned>(lane));
    };
    const CudaArgs& q = p.gemm;
    Turn<H::kStages> turn;
    int buffer = 0;
    for (int tile = first; tile < tiles; tile += stride) {
      const TilePlace at = tile_place(tile, p.clusters_n, p.tiles_m, H::kPeriod);
      const int64_t channel = (at.cluster * H::kCluster + static_cast<int>(rank)) * H::kChannels + group * 64 + w * 16 + 2 * g;
      const int64_t m0 = static_cast<int64_t>(at.tile) * H::kTokens;
      float* const row_scale = scales + buffer * H::kTokens;
      float col_scale[2] = {}, bias[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (channel + h >= q.n) continue;
        if constexpr (kSmall) col_scale[h] = __ldg(q.col_scale + channel + h);
        if (q.bias) bias[h] = __ldg(q.bias + channel + h);
      }
      if constexpr (kSmall) {
        row_scale[thread] = m0 + thread < q.m ? __ldg(q.row_scale + m0 + thread) : 0.0f;
        named_barrier(1, H::kConsumers);  // also: everybody has written the tile before the last, which had this buffer
        buffer ^= 1;
      }
      Sum sums[H::kTokens / 2];
#pragma unroll
      for (int i = 0; i < H::kTokens / 2; ++i) sums[i] = 0;
      int before = 0;
      for (int s = 0; s < p.stages; ++s, turn.next()) {
        barrier_wait(full + turn.stage, turn.parity);
        const uint32_t* const meta =
            reinterpret_cast<const uint32_t*>(shared + turn.stage * H::kStageBytes + H::kValueBytes + H::kTokenBytes) + word;
        uint32_t e[H::kSteps];
#pragma unroll
        for (int step = 0; step < H::kSteps; ++step) {
          e[step] = meta[step * H::kWords];
          if (e[step] == 0)
            e[step] = 0x44444444u;  // outside of the tensor, where values are 0: places 0 and 1, as the instruction wants some
        }
        wgmma_fence();
        const uint64_t offset = static_cast<uint64_t>(turn.stage) * (H::kStageBytes / 16);
#pragma unroll
        for (int step = 0; step < H::kSteps; ++step)
          wgmma_sparse<T>(sums, a_operand + offset + 2 * step, b_operand + offset + 4 * step, e[step]);
        wgmma_commit();
        wgmma_wait<1>();  // the stage before
        if (s > 0) release(before);
        before = turn.stage;
      }
      wgmma_wait<0>();
      if (p.stages > 0) release(before);

      const bool vector = p.vector_out && channel + 2 <= q.n;
      const int64_t token = m0 + 2 * t;
      if (q.activation == Activation::none)
        write_tile<T, Out, false>(q, sums, token, channel, row_scale + 2 * t, col_scale, bias, vector);
      else
        write_tile<T, Out, true>(q, sums, token, channel, row_scale + 2 * t, col_scale, bias, vector);
    }
  }
  cluster_barrier();  // nobody leaves while the other block's copies and arrivals are on their way here
}

template <class T, class Out>
void launch_hopper(const CudaArgs& args, const cuda::Stream& stream) {
  using H = Hopper<T>;
  const char* const what = std::is_same_v<T, int8_t> ? "int8_sparse24_linear" : "sparse24_linear";
  if (args.m > INT32_MAX / 2 || args.n > INT32_MAX / 2 || args.steps > INT32_MAX / 128)
    throw std::invalid_argument(std::string(what) + ": kernels for Hopper count tokens, channels and k in 32 bits");
  const cuda::DeviceGuard guard(stream.device, what);
  int multiprocessors = 0;
  cuda::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, stream.device), what);
  HopperArgs p{};
  if (args.steps > 0) {
    using Size = cuuint64_t;
    const Size row = static_cast<Size>(args.steps) * 32, rows = static_cast<Size>(args.n_padded);
    const Size words = rows / 64 * kMetaWords<T>;
    // Bytes, then g, h and 16 channels.
    cuda::make_tensor_map<4>(p.values, what, CU_TENSOR_MAP_DATA_TYPE_UINT8, args.values, {row, 8, 2, rows / 16}, {2 * row, row, 16 * row},
                             {H::kValueRow, 8, 2, H::kChannels / 16}, CU_TENSOR_MAP_SWIZZLE_64B);
    cuda::make_tensor_map(p.tokens, what, args.x, args.m, args.x_bytes, args.ldx, H::kTokens / H::kCluster);
    cuda::make_tensor_map<2>(p.meta, what, CU_TENSOR_MAP_DATA_TYPE_UINT32, args.meta, {words, static_cast<Size>(args.steps)}, {4 * words},
                             {H::kWords, H::kSteps}, CU_TENSOR_MAP_SWIZZLE_NONE);
  }
  p.gemm = args;
  p.clusters_n = static_cast<int>(ceil_div(args.n, H::kChannels * H::kCluster)), p.tiles_m = static_cast<int>(ceil_div(args.m, H::kTokens));
  p.stages = static_cast<int>(ceil_div(args.steps, H::kSteps));
  p.vector_out = reinterpret_cast<uintptr_t>(args.out) % (2 * sizeof(Out)) == 0 && args.n % 2 == 0;
  const int64_t tiles = static_cast<int64_t>(p.clusters_n) * p.tiles_m, at_once = multiprocessors / H::kCluster;
  const cuda::Grid grid{dim3(static_cast<unsigned>((tiles < at_once ? tiles : at_once) * H::kCluster)), H::kThreads, H::kSharedBytes,
                        H::kCluster};
  cuda::launch(what, grid, stream.stream, sparse_gemm_hopper<T, Out>, p);
}

}  // namespace pycompress::sparse24_gemm
