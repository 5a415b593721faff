// Few rows of int8 times all int4 weights: the time is that of reading the weights once per slab of 8 or 16 rows.
//
// A lane reads 16 bytes of a weight row, 32 k of a block of 128, and the same k of its rows of q (few.cuh has floats). The warps of a
// block take turns along k, a block of 128 each, and leave exact integers in shared memory; then one thread per output adds what the
// round brought, in the order of k. So the float sums have one order, and the bits are those of the CPU.
#include "weight_only/int4_int8.cuh"

namespace pycompress::weight_only {
namespace {

using namespace pycompress::cuda;

constexpr int kWarps = 8, kThreads = kWarps * 32;

template <int kGroups, int kMh, int kNt>
constexpr size_t kSharedBytes = 2 * kWarps * kGroups * (kMh * 8) * (kNt * 8) * sizeof(int32_t);

// kGroups: of a block of 128 k. kMh: 1 for up to 8 rows, 2 for up to 16; columns in kNt tiles of 8.
template <int kGroups, int kMh, int kNt>
__global__ void __launch_bounds__(kThreads) int4_int8_few(const __grid_constant__ Int8ActArgs p, unsigned slabs) {
  constexpr int kRows = kMh * 8, kColumns = kNt * 8, kOutputs = kRows * kColumns, kDepth = 8 / kNt;
  static_assert(kOutputs <= kThreads);
  int32_t* const parts = dynamic_shared<int32_t>();  // [2][kWarps][kGroups][kRows][kColumns]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  // Blocks that share weights are neighbours.
  const int64_t m0 = blockIdx.x % slabs * kRows, n0 = static_cast<int64_t>(blockIdx.x / slabs) * kColumns;
  const Weight& weight = p.weight;
  const int blocks = static_cast<int>(weight.ldw / kBlockBytes), rounds = (blocks + kWarps - 1) / kWarps;

  const auto load = [&](int block, int j) {
    const int64_t column = n0 + j * 8 + g;
    return block < blocks && column < weight.n
               ? __ldcs(reinterpret_cast<const uint4*>(weight.data + column * weight.ldw + block * kBlockBytes + t * 16))
               : make_uint4(0, 0, 0, 0);
  };

  const auto multiply = [&](int block, const uint4(&w)[kNt], int32_t* to) {
    int32_t sums[kNt][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int64_t k = static_cast<int64_t>(block) * kBlockK + chunk * 32 + t * 8;
      uint2 a[kMh];
#pragma unroll
      for (int h = 0; h < kMh; ++h) {
        const int64_t row = m0 + h * 8 + g;
        a[h] = row < p.m && k < p.ldq ? __ldg(reinterpret_cast<const uint2*>(p.q + row * p.ldq + k)) : make_uint2(0, 0);
      }
      const uint32_t of_a[4] = {a[0].x, kMh == 2 ? a[kMh - 1].x : 0u, a[0].y, kMh == 2 ? a[kMh - 1].y : 0u};
      const int64_t group = static_cast<int64_t>(block) * kGroups + chunk * kGroups / kChunks;
#pragma unroll
      for (int j = 0; j < kNt; ++j) {
        uint32_t zero = 8, of_b[2];
        const int64_t column = n0 + j * 8 + g;
        if (weight.zero && column < weight.n) zero = __ldg(weight.zero + group * weight.ldn + column);
        nibbles_to_int8(of_b, word_of(w[j], chunk), zero * 0x01010101u);
        mma_s8(sums[j], of_a, of_b);
        if ((chunk + 1) * kGroups % kChunks != 0) continue;
        int32_t* const from = to + chunk * kGroups / kChunks * kOutputs;
#pragma unroll
        for (int e = 0; e < kMh * 2; ++e) from[(e / 2 * 8 + g) * kColumns + j * 8 + t * 2 + e % 2] = sums[j][e];
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[j][e] = 0;
      }
    }
  };

  const int64_t own_row = m0 + thread / kColumns, own_column = n0 + thread % kColumns;
  const bool own = thread < kOutputs && own_row < p.m && own_column < weight.n;
  float a = 0.0f;
  uint4 ahead[kDepth][kNt];
#pragma unroll
  for (int d = 0; d < kDepth; ++d)
#pragma unroll
    for (int j = 0; j < kNt; ++j) ahead[d][j] = load(d * kWarps + warp, j);
  for (int first = 0; first < rounds; first += kDepth)
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int round = first + d, block = round * kWarps + warp;
      if (round >= rounds) continue;  // all warps
      uint4 now[kNt];
#pragma unroll
      for (int j = 0; j < kNt; ++j) {
        now[j] = ahead[d][j];
        ahead[d][j] = load(block + kDepth * kWarps, j);
      }
      // The other half is still read by those who add up the round before; this one no more, they have passed a barrier since.
      int32_t* const half = parts + round % 2 * (kWarps * kGroups * kOutputs);
      if (block < blocks) multiply(block, now, half + warp * (kGroups * kOutputs));
      __syncthreads();
      if (!own) continue;
      const float* const scale = weight.scale + static_cast<int64_t>(round) * kWarps * kGroups * weight.ldn + own_column;
      const int count = (blocks - round * kWarps < kWarps ? blocks - round * kWarps : kWarps) * kGroups;
#pragma unroll 8
      for (int i = 0; i < count; ++i) a = fmaf(static_cast<float>(half[i * kOutputs + thread]), __ldg(scale + i * weight.ldn), a);
    }
  if (!own) return;
  const float y = fmaf(a, __ldg(p.row_scale + own_row), p.bias ? __ldg(p.bias + own_column) : 0.0f);
  with_type(p.out_dtype, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    static_cast<Out*>(p.out)[own_row * weight.n + own_column] = from_float<Out>(activate(y, p.activation));
  });
}

template <int kMh, int kNt>
void run(const Int8ActArgs& args, const Stream& stream) {
  constexpr const char* kWhat = "int4_linear";
  const DeviceGuard guard(stream.device, kWhat);
  const int64_t slabs = ceil_div(args.m, kMh * 8);
  with_groups(args.weight.group_size, [&](auto groups) {
    constexpr int kGroups = decltype(groups)::value;
    const Grid grid{dim3(static_cast<unsigned>(slabs * ceil_div(args.weight.n, kNt * 8))), kThreads, kSharedBytes<kGroups, kMh, kNt>};
    launch(kWhat, grid, stream.stream, int4_int8_few<kGroups, kMh, kNt>, args, static_cast<unsigned>(slabs));
  });
}

}  // namespace

void int4_int8_few_8x8(const Int8ActArgs& args, const Stream& stream) { run<1, 1>(args, stream); }
void int4_int8_few_8x16(const Int8ActArgs& args, const Stream& stream) { run<1, 2>(args, stream); }
void int4_int8_few_16x8(const Int8ActArgs& args, const Stream& stream) { run<2, 1>(args, stream); }
void int4_int8_few_16x16(const Int8ActArgs& args, const Stream& stream) { run<2, 2>(args, stream); }

}  // namespace pycompress::weight_only
