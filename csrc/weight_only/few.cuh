// Few rows of floats times all weights, on the tensor cores, without shared memory on the way in (as int8_matmul/int8_gemm_few_cuda.cu).
//
// A lane reads 16 bytes of a weight row, widens eight of them (a chunk) at a time, and reads the same eight k of its rows of x: two
// mma. The instruction would have a lane's elements come from other places of k, but a sum does not care about the order of its terms
// as long as A and B agree. The warps of a block take turns along k and add up at the end. Weights are read `kDepth` steps ahead.
#pragma once
#include <cfloat>

#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "core/cuda/pairs.cuh"
#include "weight_only/weight_only_cuda.h"

namespace pycompress::weight_only {

constexpr int kWarps = 8, kThreads = kWarps * 32;

// The type that is multiplied, and how many of them add up to an activation.
template <class T>
struct Multiplied {
  using type = T;
  static constexpr int kParts = 1;
};
template <>
struct Multiplied<float> {
  using type = __nv_bfloat16;
  static constexpr int kParts = 3;
};

struct Int8 {
  static constexpr bool kGroups = false;
  static constexpr int kChunks = 2, kStepK = 64;
  static __device__ __forceinline__ int64_t k(int64_t step, int t, int chunk) { return step * kStepK + t * 16 + chunk * 8; }
  template <class T>
  static __device__ __forceinline__ void widen(uint32_t (&b)[4], const uint4& w, int chunk, uint32_t) {
    cuda::widen_int8<T>(b[0], b[1], chunk == 0 ? w.x : w.z);
    cuda::widen_int8<T>(b[2], b[3], chunk == 0 ? w.y : w.w);
  }
};

struct Int4 {
  static constexpr bool kGroups = true;
  static constexpr int kChunks = 4, kStepK = 128;
  static __device__ __forceinline__ int64_t k(int64_t step, int t, int chunk) { return step * kStepK + chunk * 32 + t * 8; }
  template <class T>
  static __device__ __forceinline__ void widen(uint32_t (&b)[4], const uint4& w, int chunk, uint32_t zero) {
    const uint32_t word = chunk == 0 ? w.x : chunk == 1 ? w.y : chunk == 2 ? w.z : w.w;
    cuda::widen_int4<T>(b, word, zero);
  }
};

// Eight activations of a row in registers of two, as parts that add up to them.
template <class T>
__device__ __forceinline__ void load_row(uint32_t (&parts)[Multiplied<T>::kParts][4], const T* from, bool valid) {
  if constexpr (Multiplied<T>::kParts == 1) {
    const uint4 v = valid ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
    parts[0][0] = v.x, parts[0][1] = v.y, parts[0][2] = v.z, parts[0][3] = v.w;
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = valid ? __ldg(reinterpret_cast<const uint4*>(from) + half) : make_uint4(0, 0, 0, 0);
      cuda::split_pair(parts[0][half * 2], parts[1][half * 2], parts[2][half * 2], __uint_as_float(v.x), __uint_as_float(v.y));
      cuda::split_pair(parts[0][half * 2 + 1], parts[1][half * 2 + 1], parts[2][half * 2 + 1], __uint_as_float(v.z), __uint_as_float(v.w));
    }
  }
}

// kMh: 1 for up to 8 rows, 2 for up to 16; columns in kNt tiles of 8.
template <class Format, class T, int kMh, int kNt>
__global__ void __launch_bounds__(kThreads) weight_few(const __grid_constant__ FewArgs p, unsigned slabs) {
  using namespace pycompress::cuda;
  using Element = typename Multiplied<T>::type;
  constexpr int kParts = Multiplied<T>::kParts, kDepth = 8 / kNt;
  __shared__ float partial[kWarps][kMh * 8][kNt * 8];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  // Blocks that share weights are neighbours.
  const int64_t m0 = blockIdx.x % slabs * (kMh * 8), n0 = static_cast<int64_t>(blockIdx.x / slabs) * (kNt * 8);
  const Weight& weight = p.weight;
  const int64_t steps = (weight.ldw + 63) / 64;

  const auto load = [&](int64_t step, int j) {
    const int64_t column = n0 + j * 8 + g, at = step * 64 + t * 16;
    return at < weight.ldw && column < weight.n ? __ldcs(reinterpret_cast<const uint4*>(weight.data + column * weight.ldw + at))
                                                : make_uint4(0, 0, 0, 0);
  };

  float sums[kNt][4] = {};
  const auto multiply = [&](int64_t step, const uint4(&w)[kNt]) {
    float group[Format::kGroups ? kNt : 1][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < Format::kChunks; ++chunk) {
      const int64_t k = Format::k(step, t, chunk);
      uint32_t a[kMh][kParts][4];
#pragma unroll
      for (int h = 0; h < kMh; ++h) {
        const int64_t row = m0 + h * 8 + g;
        load_row<T>(a[h], static_cast<const T*>(p.x) + row * p.ldx + k, row < p.m && k < weight.k);
      }
      int64_t scales = 0;
      if constexpr (Format::kGroups) scales = (step * Format::kStepK + chunk * 32) / weight.group_size * weight.ldn;
#pragma unroll
      for (int j = 0; j < kNt; ++j) {
        uint32_t zero = 8, b[4];
        if constexpr (Format::kGroups) {
          const int64_t column = n0 + j * 8 + g;
          if (weight.zero && column < weight.n) zero = __ldg(weight.zero + scales + column);
        }
        Format::template widen<Element>(b, w[j], chunk, zero);
        float (&sum)[4] = Format::kGroups ? group[Format::kGroups ? j : 0] : sums[j];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            const uint32_t of_a[4] = {a[0][part][i], kMh == 2 ? a[kMh - 1][part][i] : 0u, a[0][part][i + 1],
                                      kMh == 2 ? a[kMh - 1][part][i + 1] : 0u};
            const uint32_t of_b[2] = {b[i], b[i + 1]};
            mma_half<Element>(sum, of_a, of_b);
          }
      }
      if constexpr (Format::kGroups) {
        if ((chunk + 1) * 32 % weight.group_size != 0) continue;
#pragma unroll
        for (int j = 0; j < kNt; ++j) {
          const int64_t column = n0 + j * 8 + t * 2;
          const float2 scale =
              column < weight.ldn ? __ldg(reinterpret_cast<const float2*>(weight.scale + scales + column)) : make_float2(0.0f, 0.0f);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sums[j][e] = fmaf(group[j][e], e % 2 ? scale.y : scale.x, sums[j][e]);
            group[j][e] = 0.0f;
          }
        }
      }
    }
  };

  uint4 ahead[kDepth][kNt];
#pragma unroll
  for (int d = 0; d < kDepth; ++d)
#pragma unroll
    for (int j = 0; j < kNt; ++j) ahead[d][j] = load(warp + d * kWarps, j);
  for (int64_t first = warp; first < steps; first += kWarps * kDepth)
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int64_t step = first + d * kWarps;
      uint4 now[kNt];
#pragma unroll
      for (int j = 0; j < kNt; ++j) {
        now[j] = ahead[d][j];
        ahead[d][j] = load(step + kDepth * kWarps, j);
      }
      if (step < steps) multiply(step, now);
    }

#pragma unroll
  for (int j = 0; j < kNt; ++j)
#pragma unroll
    for (int e = 0; e < kMh * 2; ++e) partial[warp][e / 2 * 8 + g][j * 8 + t * 2 + e % 2] = sums[j][e];
  __syncthreads();

  T* const out = static_cast<T*>(p.out);
  for (int e = static_cast<int>(threadIdx.x); e < kMh * 8 * kNt * 8; e += kThreads) {
    const int64_t row = m0 + e / (kNt * 8), column = n0 + e % (kNt * 8);
    if (row >= p.m || column >= weight.n) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][e / (kNt * 8)][e % (kNt * 8)];
    const float bias = p.bias ? __ldg(p.bias + column) : 0.0f;
    float y;
    if constexpr (Format::kGroups)
      y = fabsf(sum) <= FLT_MAX ? sum + bias : __int_as_float(0x7fc00000);
    else
      y = fmaf(sum, __ldg(weight.scale + column), bias);
    out[row * weight.n + column] = from_float<T>(activate(y, p.activation));
  }
}

template <class Format>
void run_few(const char* what, const FewConfig& config, const FewArgs& args, const cuda::Stream& stream) {
  const cuda::DeviceGuard guard(stream.device, what);
  const int64_t slabs = ceil_div(args.m, config.rows);
  const cuda::Grid grid{dim3(static_cast<unsigned>(slabs * ceil_div(args.weight.n, config.columns))), kThreads};
  const auto with_type = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = config.rows == 8 ? (config.columns == 8 ? weight_few<Format, T, 1, 1> : weight_few<Format, T, 1, 4>)
                                         : (config.columns == 16 ? weight_few<Format, T, 2, 2> : weight_few<Format, T, 2, 8>);
    cuda::launch(what, grid, stream.stream, kernel, args, static_cast<unsigned>(slabs));
  };
  switch (args.dtype) {
    case DType::f32:
      return with_type(static_cast<float*>(nullptr));
    case DType::bf16:
      return with_type(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16:
      return with_type(static_cast<__half*>(nullptr));
  }
}

}  // namespace pycompress::weight_only
