// Many rows of int8 times int4 weights: mma.sync, operands through shared memory by cp.async, group scales in the main loop.
//
// A stage is a block of 128 k: 128 bytes of every row of q, 64 of every column, and the scales (and zero points) of its groups. A warp
// keeps the fragments of its rows of q for the whole stage; per tile of 8 columns it widens the nibbles in registers, multiplies the chunks
// of a group into integers that start at kMagic, and adds them, scaled, to its float sums: one subtraction and one fma per output and
// group.
//
// Rows of q lie with their pairs of 16-byte chunks xor row % 4, so that the 8-byte reads of half a warp (4 rows, 32 bytes each) take all
// banks once; a lane's 16 bytes of a column are next to its neighbour's. Columns are ordered as in int8_gemm.cuh: a thread ends up with
// eight neighbours of a row.
#pragma once
#include "core/cuda/async_copy.cuh"
#include "weight_only/int4_int8.cuh"

namespace pycompress::weight_only {

// A warp computes wm x wn. More columns than rows: fragments of rows stay for the whole stage and take the registers.
template <int bm, int bn, int wm, int wn, int stages, int resident>
struct Int4Tile {
  static constexpr int kBm = bm, kBn = bn, kWm = wm, kWn = wn, kStages = stages, kResident = resident;
  static constexpr int kThreads = bm / wm * (bn / wn) * 32;
  static_assert(bm % wm == 0 && wm % 16 == 0 && bn % wn == 0 && wn % 32 == 0);
};

template <class Tile, int kGroups>
constexpr int kInt4StageBytes = Tile::kBm * kBlockK + Tile::kBn * (kBlockBytes + kGroups * 5);

template <class Tile, int kGroups>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    int4_int8_gemm(const __grid_constant__ Int8ActArgs p, int64_t tiles_m, int64_t tiles_n, bool aligned_out) {
  using namespace pycompress::cuda;
  constexpr int kBm = Tile::kBm, kBn = Tile::kBn, kMt = Tile::kWm / 16, kNt = Tile::kWn / 8, kThreads = Tile::kThreads;
  constexpr int kStage = kInt4StageBytes<Tile, kGroups>, kW = kBm * kBlockK, kScale = kW + kBn * kBlockBytes,
                kZero = kScale + kGroups * kBn * 4;
  char* const shared = dynamic_shared<char>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int warp_m = warp % (kBm / Tile::kWm) * Tile::kWm, warp_n = warp / (kBm / Tile::kWm) * Tile::kWn;
  const Weight& weight = p.weight;
  const int blocks = static_cast<int>(weight.ldw / kBlockBytes);

  // Eight tiles of rows at a time share their columns' weights in the L2 cache.
  constexpr int64_t kTogether = 8;
  const int64_t in_group = kTogether * tiles_n, first_m = blockIdx.x / in_group * kTogether, rest = blockIdx.x % in_group;
  const int64_t height = tiles_m - first_m < kTogether ? tiles_m - first_m : kTogether;
  const int64_t m0 = (first_m + rest % height) * kBm, n0 = rest / height * kBn;

  constexpr int kQRows = kThreads / 8, kWRows = kThreads / 4;  // rows that one round of copies covers
  static_assert(kBm % kQRows == 0 && kBn % kWRows == 0 && kQRows % 4 == 0);
  const int q_row = thread / 8, q_chunk = thread % 8, w_row = thread / 4, w_chunk = thread % 4;
  const int8_t* const q_from = p.q + (m0 + q_row) * p.ldq + q_chunk * 16;
  const uint8_t* const w_from = weight.data + (n0 + w_row) * weight.ldw + w_chunk * 16;
  const int q_to = q_row * kBlockK + ((q_chunk / 2 ^ q_row % 4) * 2 + q_chunk % 2) * 16;
  const auto copy_stage = [&](int block, int slot) {
    char* const stage = shared + slot * kStage;
    const int64_t k = static_cast<int64_t>(block) * kBlockK;
    const bool in_k = k + q_chunk * 16 < p.ldq;
#pragma unroll
    for (int i = 0; i < kBm / kQRows; ++i)
      async_copy16(stage + q_to + i * kQRows * kBlockK, q_from + i * kQRows * p.ldq + k, in_k && m0 + q_row + i * kQRows < p.m);
#pragma unroll
    for (int i = 0; i < kBn / kWRows; ++i)
      async_copy16(stage + kW + (w_row + i * kWRows) * kBlockBytes + w_chunk * 16, w_from + i * kWRows * weight.ldw + k / 2,
                   n0 + w_row + i * kWRows < weight.n);
    for (int i = thread; i < kGroups * kBn / 4; i += kThreads) {
      const int64_t column = n0 + i % (kBn / 4) * 4;
      async_copy16(stage + kScale + i * 16, weight.scale + (static_cast<int64_t>(block) * kGroups + i / (kBn / 4)) * weight.ldn + column,
                   column < weight.ldn);
    }
    if (!weight.zero) return;
    for (int i = thread; i < kGroups * kBn / 16; i += kThreads) {
      const int64_t column = n0 + i % (kBn / 16) * 16;
      async_copy16(stage + kZero + i * 16, weight.zero + (static_cast<int64_t>(block) * kGroups + i / (kBn / 16)) * weight.ldn + column,
                   column < weight.ldn);
    }
  };

  float sums[kMt][kNt][4] = {};
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < blocks) copy_stage(s, s);
    async_commit();
  }
  int slot = 0;
  for (int block = 0; block < blocks; ++block) {
    async_wait<Tile::kStages - 2>();
    __syncthreads();  // everybody's part of this stage is there, and nobody reads the one that is overwritten next
    const int ahead = block + Tile::kStages - 1;
    if (ahead < blocks) copy_stage(ahead, slot == 0 ? Tile::kStages - 1 : slot - 1);
    async_commit();  // also an empty group: the count in async_wait stays right
    const char* const stage = shared + slot * kStage;
    uint32_t a[kMt][kChunks][4];
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          const int row = warp_m + i * 16 + h * 8 + g;
          const uint2 v = *reinterpret_cast<const uint2*>(stage + row * kBlockK + (chunk ^ row % 4) * 32 + t * 8);
          a[i][chunk][h] = v.x, a[i][chunk][2 + h] = v.y;
        }
#pragma unroll
    for (int j = 0; j < kNt; ++j) {
      const int first = warp_n + j / 4 * 32 + j % 4 * 2, of_b = first + g / 2 * 8 + g % 2, of_c = first + t * 8;  // columns
      const uint4 w = *reinterpret_cast<const uint4*>(stage + kW + of_b * kBlockBytes + t * 16);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint32_t zero = weight.zero ? static_cast<uint8_t>(stage[kZero + group * kBn + of_b]) : 8u;
        const float2 scale = *reinterpret_cast<const float2*>(stage + kScale + (group * kBn + of_c) * 4);
        int32_t part[kMt][4];
#pragma unroll
        for (int i = 0; i < kMt; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) part[i][e] = kMagic;
#pragma unroll
        for (int chunk = group * (kChunks / kGroups); chunk < (group + 1) * (kChunks / kGroups); ++chunk) {
          uint32_t b[2];
          nibbles_to_int8(b, word_of(w, chunk), zero * 0x01010101u);
#pragma unroll
          for (int i = 0; i < kMt; ++i) mma_s8(part[i], a[i][chunk], b);
        }
#pragma unroll
        for (int i = 0; i < kMt; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] = fmaf(part_of(part[i][e]), e % 2 ? scale.y : scale.x, sums[i][j][e]);
      }
    }
    slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
  }
  async_wait<0>();

  with_type(p.out_dtype, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    Out* const out = static_cast<Out*>(p.out);
#pragma unroll
    for (int j = 0; j < kNt; j += 4) {
      const int64_t column = n0 + warp_n + j * 8 + t * 8;
      const int columns = weight.n - column < 8 ? static_cast<int>(weight.n - column) : 8;  // of these eight; none if not positive
#pragma unroll
      for (int i = 0; i < kMt; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t row = m0 + warp_m + i * 16 + h * 8 + g;
          if (row >= p.m) continue;
          const float row_scale = __ldg(p.row_scale + row);
          Eight<Out> values;
#pragma unroll
          for (int c = 0; c < 8; ++c) {  // the bias comes from the cache: registers are short
            const float bias = p.bias && c < columns ? __ldg(p.bias + column + c) : 0.0f;
            values.v[c] = from_float<Out>(activate(fmaf(sums[i][j + c / 2][h * 2 + c % 2], row_scale, bias), p.activation));
          }
          Out* const to = out + row * weight.n + column;
          if (aligned_out && columns == 8) {
            store8(to, values);
          } else {
#pragma unroll
            for (int c = 0; c < 8; ++c)
              if (c < columns) to[c] = values.v[c];
          }
        }
    }
  });
}

template <class Tile>
void run_int4_int8(const Int8ActArgs& args, const cuda::Stream& stream) {
  constexpr const char* kWhat = "int4_linear";
  const cuda::DeviceGuard guard(stream.device, kWhat);
  const int64_t tiles_m = ceil_div(args.m, Tile::kBm), tiles_n = ceil_div(args.weight.n, Tile::kBn);
  const int64_t row_bytes = args.weight.n * (args.out_dtype == DType::f32 ? 4 : 2);
  const bool aligned = reinterpret_cast<uintptr_t>(args.out) % 16 == 0 && row_bytes % 16 == 0;
  with_groups(args.weight.group_size, [&](auto groups) {
    constexpr int kGroups = decltype(groups)::value;
    const cuda::Grid grid{dim3(static_cast<unsigned>(tiles_m * tiles_n)), Tile::kThreads,
                          static_cast<size_t>(Tile::kStages) * kInt4StageBytes<Tile, kGroups>};
    cuda::launch(kWhat, grid, stream.stream, int4_int8_gemm<Tile, kGroups>, args, tiles_m, tiles_n, aligned);
  });
}

}  // namespace pycompress::weight_only
