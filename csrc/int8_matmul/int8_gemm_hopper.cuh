// int8 GEMM with Hopper's own instructions (sm_90a): wgmma on operands that the copy engine brings, warpgroups with roles.
//
// A block computes tiles of kBm x kBn outputs in turn. Its last warpgroup, the producer, gives most of its registers away and has one
// thread start copies into kStages stages of 128 bytes of k. The two others, the consumers, multiply and write the outputs from registers:
// both half of the rows of a tile, or, in turns, one a tile, so that one multiplies while the other writes. Per stage, `full` says that the
// bytes are there, and `empty` that nobody reads them any more.
//
// In a cluster of two the blocks compute the same columns of neighbouring rows: each fetches half of B for both.
#pragma once
#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/tensor_map.cuh"
#include "core/cuda/tile_order.cuh"
#include "core/cuda/wgmma.cuh"
#include "int8_matmul/int8_epilogue.cuh"

namespace pycompress::int8_matmul {

// kGroupRows: rows of a tile that one consumer computes; all of them: the consumers take tiles in turns.
template <int kBm_, int kBn_, int kGroupRows_, int kStages_, int kCluster_>
struct HopperTile {
  static constexpr int kBm = kBm_, kBn = kBn_, kGroupRows = kGroupRows_, kStages = kStages_, kCluster = kCluster_;
  static constexpr bool kTurns = kGroupRows == kBm;
  static constexpr int kConsumers = 256, kThreads = kConsumers + 128, kTileThreads = kTurns ? 128 : kConsumers;
  static constexpr int kBlocks = kGroupRows / 64;  // of 64 rows, which an instruction takes
  static constexpr int kBoxRows = 128;             // of A and of B
  static constexpr int kABytes = kBm * cuda::kBoxBytes, kBBytes = kBn * cuda::kBoxBytes, kStageBytes = kABytes + kBBytes;
  static constexpr int kColumnBytes = 3 * 4 * kBn;  // scales, bias and sums of a tile's columns
  static constexpr int kColumnBuffers = kTurns ? 4 : 2;
  static constexpr int kBarriersAt = kStages * kStageBytes + kColumnBuffers * kColumnBytes;
  static constexpr int kSharedBytes = kBarriersAt + (2 * kStages + 2) * static_cast<int>(sizeof(cuda::Barrier));
  static constexpr int kPeriod = 2048 / (kBm * kCluster);  // clusters of rows that share their columns' weights in the L2 cache
  // The launch gives each of 384 threads 168 registers, a third of 64 K rounded down to a multiple of 8; roles share them out anew.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= kThreads * 168);
  static_assert(kBm == kBoxRows && kBn % (kBoxRows * kCluster) == 0 && kBn <= kTileThreads && (kTurns || 2 * kGroupRows == kBm));
  static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a block can have");
};

struct HopperArgs {
  CUtensorMap a, b;
  GemmArgs gemm;
  int clusters_m, tiles_n, steps;
  bool vector_out;  // rows of the output start at multiples of four values
};

struct Columns {
  float* scale;
  float* bias;
  int32_t* sum;
};

template <class T>
__device__ __forceinline__ void load_columns(const GemmArgs& p, const Columns& to, int n0, int thread) {
  if (thread >= T::kBn) return;
  const int64_t column = n0 + thread;
  const bool inside = column < p.n;
  to.scale[thread] = inside ? __ldg(p.col_scale + column) : 0.0f;
  to.bias[thread] = inside && p.bias ? __ldg(p.bias + column) : 0.0f;
  to.sum[thread] = inside && p.row_zero ? __ldg(p.column_sum + column) : 0;
}

// Two neighbouring outputs of a row.
template <class Out>
struct alignas(2 * sizeof(Out)) Two {
  Out v[2];
};

// `left`: of the columns from `to` on that exist.
template <bool kVector, class Out, class V>
__device__ __forceinline__ void store(Out* to, int left, const V& values) {
  if constexpr (kVector) {
    *reinterpret_cast<V*>(to) = values;
  } else {
#pragma unroll
    for (int c = 0; c < static_cast<int>(sizeof(V) / sizeof(Out)); ++c)
      if (c < left) to[c] = reinterpret_cast<const Out*>(&values)[c];
  }
}

// Writes 64 rows, those of one instruction. Four lanes hold eight neighbouring columns of a row, two each: 32 bytes, or with 16-bit outputs
// only 16, where pairs of lanes exchange halves so that it is two such runs and 32 bytes again. kVector: all columns exist and are aligned.
// kActivate: there may be an activation; without, the code is a straight line.
template <class T, class Out, bool kVector, bool kActivate>
__device__ __forceinline__ void write_rows(const GemmArgs& p, const Columns& columns, const int32_t (&sums)[T::kBn / 2], int64_t row0,
                                           int n0, const float (&row_scale)[2], const int32_t (&zero)[2], int lane) {
  const int t = lane % 4;
  const bool odd = t % 2 != 0;
  const int first = sizeof(Out) == 4 ? 2 * t : 8 * odd + t / 2 * 4;  // column of this lane's values of a pair of tiles
  const int left = static_cast<int>(p.n - n0) - first;
  Out* const out = static_cast<Out*>(p.out) + row0 * p.n + n0 + first;
  Out* const to[2] = {out, out + 8 * p.n};
  const bool exists[2] = {row0 < p.m, row0 + 8 < p.m};
#pragma unroll
  for (int j = 0; j < T::kBn / 8; j += 2) {
    Two<float> scale[2], bias[2];
    Two<int32_t> sum[2];
    if constexpr (!std::is_same_v<Out, int32_t>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[i] = *reinterpret_cast<const Two<float>*>(columns.scale + 8 * (j + i) + 2 * t);
        bias[i] = *reinterpret_cast<const Two<float>*>(columns.bias + 8 * (j + i) + 2 * t);
        sum[i] = *reinterpret_cast<const Two<int32_t>*>(columns.sum + 8 * (j + i) + 2 * t);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Two<Out> two[2];
      if constexpr (std::is_same_v<Out, int32_t>) {
#pragma unroll
        for (int c = 0; c < 4; ++c) two[c / 2].v[c % 2] = sums[4 * (j + c / 2) + 2 * h + c % 2];
      } else {
        float y[4];
#pragma unroll
        for (int c = 0; c < 4; ++c)
          y[c] = scaled(sums[4 * (j + c / 2) + 2 * h + c % 2], row_scale[h], zero[h], scale[c / 2].v[c % 2], sum[c / 2].v[c % 2],
                        bias[c / 2].v[c % 2]);
        if (kActivate && p.activation != Activation::none) {
#pragma unroll
          for (int c = 0; c < 4; ++c) y[c] = cuda::activate(y[c], p.activation);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) two[c / 2].v[c % 2] = cuda::from_float<Out>(y[c]);
      }
      if constexpr (sizeof(Out) == 4) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (exists[h]) store<kVector>(to[h] + 8 * (j + i), left - 8 * (j + i), two[i]);
      } else {
        // An odd lane gives its values of tile j and gets the even one's of tile j + 1.
        const uint32_t words[2] = {*reinterpret_cast<const uint32_t*>(&two[0]), *reinterpret_cast<const uint32_t*>(&two[1])};
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? words[0] : words[1], 1);
        const uint2 four = odd ? make_uint2(other, words[1]) : make_uint2(words[0], other);
        if (exists[h]) store<kVector>(to[h] + 8 * j, left - 8 * j, four);
      }
    }
  }
}

template <class T, class Out>
__device__ __forceinline__ void write_tile(const HopperArgs& p, const Columns& columns, const int32_t (&sums)[T::kBn / 2], int64_t row0,
                                           int n0, const float (&row_scale)[2], const int32_t (&zero)[2], int lane) {
  const bool vector = p.vector_out && n0 + T::kBn <= p.gemm.n;
  if (!vector)
    write_rows<T, Out, false, true>(p.gemm, columns, sums, row0, n0, row_scale, zero, lane);
  else if (std::is_same_v<Out, int32_t> || p.gemm.activation == Activation::none)
    write_rows<T, Out, true, false>(p.gemm, columns, sums, row0, n0, row_scale, zero, lane);
  else
    write_rows<T, Out, true, true>(p.gemm, columns, sums, row0, n0, row_scale, zero, lane);
}

template <class T, class Out>
__global__ void __launch_bounds__(T::kThreads, 1) int8_gemm_hopper(const __grid_constant__ HopperArgs p) {
  using namespace pycompress::cuda;
  char* const shared = dynamic_shared<char>();
  const auto a_stage = [&](int stage) { return shared + stage * T::kStageBytes; };
  const auto b_stage = [&](int stage) { return shared + stage * T::kStageBytes + T::kABytes; };
  float* const column_data = reinterpret_cast<float*>(shared + T::kStages * T::kStageBytes);
  Barrier* const full = reinterpret_cast<Barrier*>(shared + T::kBarriersAt);
  Barrier* const empty = full + T::kStages;
  Barrier* const starts = empty + T::kStages;  // of consumers that take turns: the other one has begun to multiply its last stage
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const unsigned rank = T::kCluster == 1 ? 0 : cluster_rank();
  const int tiles = p.clusters_m * p.tiles_n, first = static_cast<int>(blockIdx.x) / T::kCluster,
            stride = static_cast<int>(gridDim.x) / T::kCluster;

  if (thread == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, T::kTileThreads / 32 * T::kCluster);  // the warps that consume it, in every block that a copy reaches
    }
    for (int g = 0; g < 2; ++g) barrier_init(starts + g, T::kTileThreads / 32);
    barrier_init_fence();
  }
  if constexpr (T::kCluster > 1)
    cluster_barrier();
  else
    __syncthreads();

  if (thread >= T::kConsumers) {
    give_registers_back<T::kProducerRegisters>();
    if (thread == T::kConsumers && p.steps > 0) {
      prefetch_tensor_map(&p.a);
      prefetch_tensor_map(&p.b);
      constexpr int kBoxes = T::kBn / T::kBoxRows / T::kCluster;  // of B that this block fetches
      Turn<T::kStages> turn;
      for (int tile = first; tile < tiles; tile += stride) {
        const TilePlace at = tile_place(tile, p.clusters_m, p.tiles_n, T::kPeriod);
        const int m0 = (at.cluster * T::kCluster + static_cast<int>(rank)) * T::kBm, n0 = at.tile * T::kBn;
        for (int step = 0; step < p.steps; ++step, turn.next()) {
          barrier_wait(empty + turn.stage, turn.parity ^ 1);
          Barrier* const bar = full + turn.stage;
          barrier_arrive_expect(bar, T::kStageBytes);
          copy_box<false>(a_stage(turn.stage), &p.a, bar, step * kBoxBytes, m0);
#pragma unroll
          for (int i = 0; i < kBoxes; ++i) {
            const int box = static_cast<int>(rank) * kBoxes + i;
            copy_box<(T::kCluster > 1)>(b_stage(turn.stage) + box * T::kBoxRows * kBoxBytes, &p.b, bar, step * kBoxBytes,
                                        n0 + box * T::kBoxRows, (1u << T::kCluster) - 1);
          }
        }
      }
    }
  } else {
    take_registers<T::kConsumerRegisters>();
    const int group = __shfl_sync(0xffffffffu, warp / 4, 0);  // the same in all lanes, which the compiler then knows
    const int first_row = (T::kTurns ? 0 : group * T::kGroupRows), lane_row = first_row + warp % 4 * 16 + lane / 4;
    const uint64_t a_operand = wgmma_operand(a_stage(0) + first_row * kBoxBytes), b_operand = wgmma_operand(b_stage(0));
    const auto release = [&](int stage) {
      if constexpr (T::kCluster == 1) {
        if (lane == 0) barrier_arrive(empty + stage);
      } else {
        if (lane < T::kCluster) barrier_arrive_at(empty + stage, static_cast<unsigned>(lane));
      }
    };
    Turn<T::kStages> turn;
    int buffer = T::kTurns ? 2 * group : 0, index = 0;
    for (int tile = first; tile < tiles; tile += stride, ++index) {
      if (T::kTurns && index % 2 != group) {
        turn.skip(p.steps);
        continue;
      }
      const TilePlace at = tile_place(tile, p.clusters_m, p.tiles_n, T::kPeriod);
      const int m0 = (at.cluster * T::kCluster + static_cast<int>(rank)) * T::kBm, n0 = at.tile * T::kBn;
      float* const data = column_data + buffer * 3 * T::kBn;
      const Columns columns{data, data + T::kBn, reinterpret_cast<int32_t*>(data + 2 * T::kBn)};
      float row_scale[T::kBlocks][2] = {};
      int32_t zero[T::kBlocks][2] = {};
      if constexpr (!std::is_same_v<Out, int32_t>) {
        load_columns<T>(p.gemm, columns, n0, thread % T::kTileThreads);
#pragma unroll
        for (int i = 0; i < 2 * T::kBlocks; ++i) {
          const int64_t row = m0 + lane_row + 8 * (i % 2) + 64 * (i / 2);
          if (row < p.gemm.m) {
            row_scale[i / 2][i % 2] = __ldg(p.gemm.row_scale + row);
            if (p.gemm.row_zero) zero[i / 2][i % 2] = __ldg(p.gemm.row_zero + row);
          }
        }
        // Also: everybody has written the tile before the last one of these threads, which had this buffer.
        named_barrier(T::kTurns ? 1 + group : 1, T::kTileThreads);
        buffer ^= 1;
      }
      int32_t sums[T::kBlocks][T::kBn / 2];
#pragma unroll
      for (int i = 0; i < T::kBlocks; ++i)
#pragma unroll
        for (int c = 0; c < T::kBn / 2; ++c) sums[i][c] = 0;
      // Phases of `full` are told apart by parity only: whoever waits for one must know that the one before has ended.
      if constexpr (T::kTurns) barrier_wait(starts + group, static_cast<unsigned>(index / 2 ^ group ^ 1) & 1);
      int before = 0;
      for (int step = 0; step < p.steps; ++step, turn.next()) {
        barrier_wait(full + turn.stage, turn.parity);
        wgmma_fence();
        const uint64_t offset = static_cast<uint64_t>(turn.stage) * (T::kStageBytes / 16);
#pragma unroll
        for (int k = 0; k < kBoxBytes / 32; ++k)
#pragma unroll
          for (int i = 0; i < T::kBlocks; ++i)
            wgmma_s8<T::kBn>(sums[i], a_operand + offset + i * (64 * kBoxBytes / 16) + 2 * k, b_operand + offset + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();  // the step before
        if (step > 0) release(before);
        before = turn.stage;
      }
      if constexpr (T::kTurns) {
        if (lane == 0) barrier_arrive(starts + (group ^ 1));
      }
      wgmma_wait<0>();
      if (p.steps > 0) release(before);
#pragma unroll
      for (int i = 0; i < T::kBlocks; ++i) write_tile<T, Out>(p, columns, sums[i], m0 + lane_row + 64 * i, n0, row_scale[i], zero[i], lane);
    }
  }
  if constexpr (T::kCluster > 1) cluster_barrier();  // nobody leaves while the other block's copies and arrivals are on their way here
}

template <class T>
void launch_hopper(const GemmArgs& args, const cuda::Stream& stream) {
  const char* const what = args.out_type == GemmOut::i32 ? "int8_matmul" : "int8_linear";
  if (args.m > INT32_MAX / 2 || args.n > INT32_MAX / 2 || args.k > INT32_MAX / 2)
    throw std::invalid_argument(std::string(what) + ": kernels for Hopper count rows, columns and k in 32 bits");
  const cuda::DeviceGuard guard(stream.device, what);
  int multiprocessors = 0;
  cuda::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, stream.device), what);
  HopperArgs p{};
  if (args.k > 0) {
    cuda::make_tensor_map(p.a, what, args.a, args.m, args.k, args.lda, T::kBoxRows);
    cuda::make_tensor_map(p.b, what, args.b, args.n, args.k, args.ldb, T::kBoxRows);
  }
  p.gemm = args;
  p.clusters_m = static_cast<int>(ceil_div(args.m, T::kBm * T::kCluster)), p.tiles_n = static_cast<int>(ceil_div(args.n, T::kBn));
  p.steps = static_cast<int>(ceil_div(args.k, cuda::kBoxBytes));
  const int64_t tiles = static_cast<int64_t>(p.clusters_m) * p.tiles_n, at_once = multiprocessors / T::kCluster;
  const cuda::Grid grid{dim3(static_cast<unsigned>((tiles < at_once ? tiles : at_once) * T::kCluster)), T::kThreads, T::kSharedBytes,
                        T::kCluster};
  with_out_type(args.out_type, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kVector = sizeof(Out) == 4 ? 2 : 4;
    p.vector_out = reinterpret_cast<uintptr_t>(args.out) % 8 == 0 && args.n % kVector == 0;
    cuda::launch(what, grid, stream.stream, int8_gemm_hopper<T, Out>, p);
  });
}

}  // namespace pycompress::int8_matmul
