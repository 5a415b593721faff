// 2:4 sparse linear layers on the tensor cores of a GPU: out = act(x * weight^T * scales + bias), int8 or 16-bit floats.
//
// The instructions want the sparse operand on the left, so the channels of the weight are the rows of their tiles and the tokens of x
// the columns. A step is 64 bytes of k of x (32 floats, 64 int8) and 32 bytes of kept values. pycompress/ops/cuda/sparse24.py packs:
//
//   values  (n_padded, 32 * steps bytes), canonical, n_padded a multiple of 128, padding 0
//   meta    (steps, n_padded / 64, words): 64 channels in the order of lanes (mma_sparse.cuh); within 64 channels, row g + 8 h of tile i
//           is channel 8 g + 2 i + h, so that a thread ends up with eight neighbouring channels of a token
#pragma once
#include <cstdint>

#include "core/cuda/stream.h"
#include "core/types.h"

namespace pycompress::sparse24_gemm {

enum class Element : int { bf16 = 1, f16 = 2, i8 = 3 };

struct CudaArgs {
  int64_t m, n, n_padded, steps;
  const void* x;    // (m, x_bytes), rows aligned to 16 bytes
  int64_t ldx;      // bytes
  int64_t x_bytes;  // of a row that exist, a multiple of 16; what is behind k is 0
  Element element;
  const void* values;
  const uint32_t* meta;
  const float* row_scale;  // (m), int8 only
  const float* col_scale;  // (n), int8 only
  const float* bias;       // (n) or null
  Activation activation;
  void* out;  // (m, n) contiguous; 16-bit floats: the type of x
  DType out_dtype;
};

// A block computes bn channels of bm tokens; the warps of `split` groups take turns along k. "hopper" is for compute capability 9.0 only.
struct CudaConfig {
  const char* name;
  int bn, bm, split;
};
inline constexpr CudaConfig kCudaConfigs[] = {{"128x128", 128, 128, 1}, {"64x64", 64, 64, 1}, {"few", 64, 16, 4}, {"hopper", 128, 256, 1}};

// Throws std::invalid_argument for an unknown name, std::runtime_error if the launch fails.
void run_cuda(const char* config, const CudaArgs& args, const cuda::Stream& stream);

// float32, 2:4 and 1:4: tensor cores have no such product, so plain fma, made for few rows, where reading the kept values and their places
// is all the time. pycompress/ops/cuda/sparse24_float.py packs: canonical values and indices with rows padded to whole chunks.
struct FloatWeight {
  int64_t n, k, chunks;    // a chunk: four values, 16 bytes, and a byte with their four places
  int per_group;           // values that a group of four k keeps: 2 or 1
  const float* values;     // (n, 4 * chunks), aligned to 16
  const uint8_t* indices;  // (n, chunks)
};

struct FloatArgs {
  FloatWeight weight;
  int64_t m;
  const float* x;  // (m, ldx): rows aligned to 16 bytes, of k elements and zeros up to a multiple of 4
  int64_t ldx;
  const float* bias;  // (n) or null
  Activation activation;
  float* out;  // (m, n) contiguous
};

// Any m; the weight is read once per 8 rows.
void float_few_cuda(const FloatArgs& args, const cuda::Stream& stream);

// The dense weight (n, ldo): ldo a multiple of 4, at least k; aligned to 16; what lies behind k is overwritten.
void float_dense_cuda(const FloatWeight& weight, float* out, int64_t ldo, const cuda::Stream& stream);

}  // namespace pycompress::sparse24_gemm
