// Implicit GEMM on the tensor cores of sm_80 and newer: rows are output pixels, columns output channels, the depth runs over (ky, kx,
// channel). As int8_matmul/int8_gemm.cuh (stages of 64 bytes of the depth, swizzled in the same way), but for where a row comes from:
// each thread knows the first tap of its rows (y, x and their place in memory), and for the 16 bytes of the depth that it copies
// next, which tap and channel they are. Where that pixel is padding, a line of zero points is copied. With few channels the 16 bytes
// span taps: kUnit = 8 or 4 bytes are copied at a time then.
//
// Where the tiles are fewer than the GPU has room for, `splits` blocks share the depth of one: they add up in global memory, and the
// last to finish does the epilogue. Integers add up in any order.
#pragma once
#include <algorithm>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "int8_conv2d/int8_conv2d_epilogue.cuh"
#include "int8_conv2d/output_pixels.cuh"
#include "int8_conv2d/padding_line.cuh"

namespace pycompress::int8_conv2d {

constexpr int kStageK = 64;

template <int kBm_, int kBn_, int kWm_, int kWn_, int kStages_, int kBlocksPerSm_, int kUnit_>
struct Tile {
  static constexpr int kBm = kBm_, kBn = kBn_, kWm = kWm_, kWn = kWn_, kStages = kStages_, kBlocksPerSm = kBlocksPerSm_, kUnit = kUnit_;
  static constexpr int kThreads = (kBm / kWm) * (kBn / kWn) * 32;
  static constexpr int kStageBytes = (kBm + kBn) * kStageK;
  static constexpr int kRowStep = kBn + 4;  // of finished sums, in words
  static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kBm * kRowStep * 4);
  static constexpr int kSums = (kWm / 16) * (kWn / 8) * 4;  // of a thread
  static_assert(kWm % 16 == 0 && kWn % 32 == 0 && kBm % (kThreads / 4) == 0 && kBn % (kThreads / 4) == 0 && kThreads % 128 == 0);
  static_assert(kSharedBytes <= 99 * 1024, "more shared memory than an sm_86 has");
  static_assert(kUnit == 16 || kUnit == 8 || kUnit == 4);
};

// ConvArgs in the form in which threads use them.
struct Gather {
  const int8_t* weight;
  int32_t* partial;
  OutputPixels pixels;
  int64_t depth;
  int columns, padded, taps_depth, zero_point;  // output channels of a set; bytes of a tap; bytes of all taps
  int steps, splits, steps_per_split;
  cuda::Divider per_tap, kernel_w, per_tile, tiles_n, sets;

  Gather(const ConvArgs& a, int bn)
      : weight(a.weight),
        partial(a.partial),
        pixels(a),
        depth(a.depth),
        columns(static_cast<int>(a.shape.o / a.sets)),
        padded(static_cast<int>(a.padded)),
        taps_depth(static_cast<int>(a.shape.taps() * a.padded)),
        zero_point(a.output.zero_point),
        steps(static_cast<int>(ceil_div(a.depth, kStageK))),
        splits(static_cast<int>(a.splits)),
        steps_per_split(static_cast<int>(ceil_div(steps, splits))),
        per_tap(a.padded),
        kernel_w(a.shape.kw),
        per_tile(splits),
        tiles_n(ceil_div(columns, bn)),
        sets(a.sets) {}
};

template <class T, class Out>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    int8_conv2d_gemm(const __grid_constant__ Gather p, const __grid_constant__ Output output) {
  using namespace pycompress::cuda;
  constexpr int kRows = T::kThreads / 4;  // rows that one round of copies covers
  constexpr int kMt = T::kWm / 16, kNt = T::kWn / 8, kCopies = T::kBm / kRows, kPieces = 16 / T::kUnit;
  int8_t* const shared = dynamic_shared<int8_t>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warp_m = warp % (T::kBm / T::kWm) * T::kWm, warp_n = warp / (T::kBm / T::kWm) * T::kWn;

  // Neighbouring blocks share the pixels.
  int split, tile_n, set;
  const int tile = p.per_tile.divide(static_cast<int>(blockIdx.x), split);
  const int m0 = p.sets.divide(p.tiles_n.divide(tile, tile_n), set) * T::kBm, n0 = tile_n * T::kBn;
  const int first_step = split * p.steps_per_split;
  const int last_step = first_step + p.steps_per_split < p.steps ? first_step + p.steps_per_split : p.steps;

  const int copy_row = thread / 4, copy_chunk = thread % 4;
  const int a_to = copy_row * kStageK + (copy_chunk ^ (copy_row / 2 % 4)) * 16;
  const int b_to = T::kBm * kStageK + copy_row * kStageK + (copy_chunk ^ (copy_row / 8 % 4)) * 16;
  const int8_t* const b_from = p.weight + (static_cast<int64_t>(set) * p.columns + n0 + copy_row) * p.depth;
  const int8_t* const padding = padding_lines.of[p.zero_point + 128];
  int y0[kCopies], x0[kCopies];
  uint32_t place0[kCopies];
  const int8_t* image[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    int index, pixel;
    p.pixels.locate(m0 + copy_row + i * kRows, index, pixel, y0[i], x0[i]);
    place0[i] = p.pixels.place(y0[i], x0[i]) + static_cast<uint32_t>(set * p.padded);
    image[i] = p.pixels.image(index);
  }
  const auto copy_stage = [&](int step, int slot) {
    int8_t* const stage = shared + slot * T::kStageBytes;
    const int k0 = step * kStageK + copy_chunk * 16;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int k = k0 + piece * T::kUnit;
      int channel, kx;
      const int tap = p.per_tap.divide(k, channel), ky = p.kernel_w.divide(tap, kx);
      // Behind the last tap any bytes will do: the weights are zero there.
      const int dy = ky * p.pixels.dilation_h, dx = kx * p.pixels.dilation_w, y_step = k < p.taps_depth ? dy : kOutside;
      const uint32_t place = p.pixels.place(dy, dx) + static_cast<uint32_t>(channel);
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        async_copy<T::kUnit>(stage + a_to + i * kRows * kStageK + piece * T::kUnit,
                             p.pixels.inside(y0[i] + y_step, x0[i] + dx) ? image[i] + (place0[i] + place) : padding);
    }
    const bool in_k = k0 < p.depth;
#pragma unroll
    for (int i = 0; i < T::kBn / kRows; ++i)
      async_copy16(stage + b_to + i * kRows * kStageK, b_from + i * kRows * p.depth + k0, in_k && n0 + copy_row + i * kRows < p.columns);
  };

  // As in int8_gemm.cuh.
  const int a_row = warp_m + lane % 16, a_swizzle = a_row / 2 % 4;
  const int b_row = warp_n + lane % 8 / 2 * 8 + lane / 16 * 2 + lane % 2, b_swizzle = b_row / 8 % 4;

  int32_t sums[kMt][kNt][4] = {};
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (first_step + s < last_step) copy_stage(first_step + s, s);
    async_commit();
  }
  int slot = 0;
  for (int step = first_step; step < last_step; ++step) {
    async_wait<T::kStages - 2>();
    __syncthreads();  // everybody's part of this stage is there, and nobody reads the one that is overwritten next
    const int ahead = step + T::kStages - 1;
    if (ahead < last_step) copy_stage(ahead, slot == 0 ? T::kStages - 1 : slot - 1);
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

  if (p.splits > 1) {
    // Counters of the tiles, then their sums, a register of all threads after the other.
    __shared__ int arrived;
    const int tiles = static_cast<int>(gridDim.x) / p.splits;
    int32_t* const total = p.partial + (tiles + 3) / 4 * 4 + static_cast<int64_t>(tile) * T::kBm * T::kBn + thread;
#pragma unroll
    for (int r = 0; r < T::kSums; ++r) atomicAdd(total + r * T::kThreads, sums[r / (kNt * 4)][r / 4 % kNt][r % 4]);
    __threadfence();
    __syncthreads();
    if (thread == 0) arrived = atomicAdd(p.partial + tile, 1);
    __syncthreads();
    if (arrived != p.splits - 1) return;
    __threadfence();
#pragma unroll
    for (int r = 0; r < T::kSums; ++r) sums[r / (kNt * 4)][r / 4 % kNt][r % 4] = __ldcg(total + r * T::kThreads);
  }

  // Through shared memory to whole pixels (channels_last) or runs of pixels (NCHW) per warp. The row step keeps 16-byte accesses of
  // neighbouring rows in different banks.
  int32_t* const staged = dynamic_shared<int32_t>();
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kNt; j += 4)
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int4* const to =
            reinterpret_cast<int4*>(staged + (warp_m + i * 16 + h * 8 + lane / 4) * T::kRowStep + warp_n + j * 8 + lane % 4 * 8);
        to[0] = make_int4(sums[i][j][h * 2], sums[i][j][h * 2 + 1], sums[i][j + 1][h * 2], sums[i][j + 1][h * 2 + 1]);
        to[1] = make_int4(sums[i][j + 2][h * 2], sums[i][j + 2][h * 2 + 1], sums[i][j + 3][h * 2], sums[i][j + 3][h * 2 + 1]);
      }
  __syncthreads();
  // Eight channels of a pixel at a time. channels_last: neighbouring threads have neighbouring channels; NCHW: neighbouring pixels. Either
  // way a thread keeps its channels while it goes through the rows.
  constexpr int kEights = T::kBn / 8;
  const bool channels_last = output.args.channels_last;
  const int row_step = channels_last ? T::kThreads / kEights : 32, eight_step = channels_last ? kEights : T::kThreads / 32;
#pragma unroll 1
  for (int eight = channels_last ? thread % kEights : warp; eight < kEights; eight += eight_step) {
    const int column = n0 + eight * 8, columns = min(p.columns - column, 8);
    const int64_t first = static_cast<int64_t>(set) * p.columns + column;
    Channel channels[8];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (c < columns) channels[c].load(output.args, first + c);
    if (columns <= 0) break;
#pragma unroll 1
    for (int in_row = channels_last ? thread / kEights : lane; in_row < T::kBm; in_row += row_step) {
      if (m0 + in_row >= p.pixels.rows) break;
      int pixel;
      const int image = p.pixels.plane.divide(m0 + in_row, pixel);
      const int4* const from = reinterpret_cast<const int4*>(staged + in_row * T::kRowStep + eight * 8);
      const int4 low = from[0], high = from[1];
      store_channels<Out>(output, image, pixel, first, columns, {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}, channels);
    }
  }
}

template <class T>
void launch_conv(const ConvArgs& args, const cuda::Stream& stream) {
  constexpr const char* kWhat = "int8_conv2d";
  if (args.padded % T::kUnit) throw std::invalid_argument("int8_conv2d: the configuration copies more bytes than a tap has");
  const cuda::DeviceGuard guard(stream.device, kWhat);
  const Gather gather(args, T::kBn);
  const int64_t tiles = ceil_div(gather.pixels.rows, T::kBm) * ceil_div(gather.columns, T::kBn) * args.sets;
  if (args.splits > 1)
    cuda::check(cudaMemsetAsync(args.partial, 0, static_cast<size_t>(round_up(tiles, 4) + tiles * T::kBm * T::kBn) * sizeof(int32_t),
                                static_cast<cudaStream_t>(stream.stream)),
                kWhat);
  const cuda::Grid grid{dim3(static_cast<unsigned>(tiles * args.splits)), T::kThreads, T::kSharedBytes};
  with_out_type(args.output.out_type, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    cuda::launch(kWhat, grid, stream.stream, int8_conv2d_gemm<T, Out>, gather, Output(args, gather.columns));
  });
}

}  // namespace pycompress::int8_conv2d
