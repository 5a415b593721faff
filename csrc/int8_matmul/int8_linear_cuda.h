// The int8 linear layer on a GPU: quantise rows, multiply, finish. Contract and arithmetic are those of int8_matmul.h.
//
// Operands lie in memory as they are: A (M, lda) and B (N, ldb) int8 with rows padded to a multiple of 16 bytes; B's padding is
// zero, A's may be anything. Everything else (any M, N, K) is predicated inside the kernels. Python allocates, checks and plans
// (pycompress/ops/cuda/); nothing here allocates or waits for the device. Plain C++: bindings include it.
#pragma once
#include <cstdint>

#include "core/types.h"

namespace pycompress::cuda {
struct Stream;
}

namespace pycompress::int8_matmul {

struct QuantizeRowsArgs {
  int64_t m, k;
  const void* x;  // (m, k), row stride ldx in elements
  int64_t ldx;
  DType dtype;
  bool dynamic, asymmetric;  // as in LinearArgs
  float x_scale;
  int x_zero_point, quant_min;
  int8_t* q;  // (m, ldq), ldq a multiple of 16, aligned to 16; the padding becomes 0
  int64_t ldq;
  float* row_scale;   // (m); NaN for rows with NaN or Inf
  int32_t* row_zero;  // (m)
};

// One pass over x: a row stays on chip between the search for its range and its rounding, up to 96 KB.
void quantize_rows_cuda(const QuantizeRowsArgs& args, const cuda::Stream& stream);

// What comes out: the DType numbers, or the int32 sum itself (no scales, bias or activation).
enum class GemmOut : int { f32 = 0, bf16 = 1, f16 = 2, i32 = 3 };

struct GemmArgs {
  int64_t m, n, k;  // k: padded, a multiple of 16
  const int8_t* a;
  const int8_t* b;
  int64_t lda, ldb;
  const float* row_scale;
  const int32_t* row_zero;  // or null: no zero points
  const float* col_scale;
  const int32_t* column_sum;  // read only with row_zero
  const float* bias;          // or null
  Activation activation;
  void* out;  // (m, n) contiguous
  GemmOut out_type;
};

using Gemm = void (*)(const GemmArgs&, const cuda::Stream&);

// mma.sync with cp.async in several stages; a block computes a tile of bm x bn.
void gemm_cuda_128x256(const GemmArgs& args, const cuda::Stream& stream);
void gemm_cuda_128x128(const GemmArgs& args, const cuda::Stream& stream);
void gemm_cuda_64x128(const GemmArgs& args, const cuda::Stream& stream);
void gemm_cuda_64x64(const GemmArgs& args, const cuda::Stream& stream);
// The same with Hopper's own instructions, wgmma and the copy engine: only on compute capability 9.0.
void gemm_cuda_hopper_128x256(const GemmArgs& args, const cuda::Stream& stream);
void gemm_cuda_hopper_128x128(const GemmArgs& args, const cuda::Stream& stream);
// Few rows (m <= bm): streams the weights past them, the warps of a block share K.
void gemm_cuda_few_16x16(const GemmArgs& args, const cuda::Stream& stream);
void gemm_cuda_few_16x8(const GemmArgs& args, const cuda::Stream& stream);
void gemm_cuda_few_32x16(const GemmArgs& args, const cuda::Stream& stream);

struct GemmConfig {
  const char* name;
  int bm, bn;
  Gemm run;
};

// pycompress/ops/cuda/int8_linear.py chooses by name and has the same sizes.
inline constexpr GemmConfig kGemmConfigs[] = {
    {"128x256", 128, 256, gemm_cuda_128x256},
    {"128x128", 128, 128, gemm_cuda_128x128},
    {"64x128", 64, 128, gemm_cuda_64x128},
    {"64x64", 64, 64, gemm_cuda_64x64},
    {"few_16x16", 16, 16, gemm_cuda_few_16x16},
    {"few_16x8", 16, 8, gemm_cuda_few_16x8},
    {"few_32x16", 32, 16, gemm_cuda_few_32x16},
    {"hopper_128x256", 128, 256, gemm_cuda_hopper_128x256},
    {"hopper_128x128", 128, 128, gemm_cuda_hopper_128x128},
};

}  // namespace pycompress::int8_matmul
