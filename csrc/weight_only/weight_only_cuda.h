// Linear layers with int8 or int4 weights and float activations on a GPU. Arithmetic: float32 sums of x * w, weights exact integers.
//
//   int8   y = act(sum_k x * w * scale[n] + bias)                    w: (n, ldw) bytes, rows padded with anything to 16 bytes
//   int4   y = act(sum_groups (sum_k x * (u - zero)) * scale + bias)   64 bytes are 128 k of a row: 16-byte piece t, word c, holds
//          k = 32 c + 8 t + 0..7, the even ones in its low half, the odd ones in its high half, each rising; scale and zero lie
//          as (groups, ldn), for all groups of the padded k. A sum that is not finite becomes NaN.
//
// int4 weights with int8 activations, the bits of int4_matmul.h whatever the configuration:
//
//   part = sum_k q * (u - zero), an exact integer   a = fma(part, scale, a) for ascending groups   y = act(fma(a, row_scale, bias))
//
// float32 activations are split into three bfloat16 that add up to them exactly: Inf becomes NaN.
//
// Python allocates, checks and plans (pycompress/ops/cuda/weight_only.py). Plain C++: bindings include it.
#pragma once
#include <cstdint>

#include "core/types.h"

namespace pycompress::cuda {
struct Stream;
}

namespace pycompress::weight_only {

struct Weight {
  int64_t n, k;
  const uint8_t* data;  // aligned to 16
  int64_t ldw;          // bytes of a row, a multiple of 16 (int8) or 64 (int4)
  const float* scale;   // int4: aligned to 16
  const uint8_t* zero;  // int4 only, aligned to 16; null: 8
  int64_t ldn;          // int4 only, a multiple of 16, at least n
  int group_size;       // int4: 32, 64 or 128; int8: 0
};

// Few rows: the time is that of reading the weights once per `rows` rows.
struct FewArgs {
  Weight weight;
  int64_t m;
  const void* x;  // (m, ldx): rows of k elements and zeros up to a multiple of 8, ldx a multiple of 8, aligned to 16
  int64_t ldx;
  DType dtype;  // of x and out
  const float* bias;
  Activation activation;
  void* out;  // (m, n)
};

struct FewConfig {
  const char* name;
  int rows, columns;  // of a block
};

// pycompress/ops/cuda/weight_only.py chooses by name and has the same sizes.
inline constexpr FewConfig kFewConfigs[] = {{"8x8", 8, 8}, {"8x32", 8, 32}, {"16x16", 16, 16}, {"16x64", 16, 64}};

void int8_few_cuda(const FewConfig& config, const FewArgs& args, const cuda::Stream& stream);
void int4_few_cuda(const FewConfig& config, const FewArgs& args, const cuda::Stream& stream);

struct Int8ActArgs {
  Weight weight;  // int4
  int64_t m;
  const int8_t* q;  // (m, ldq), the activations: zeros behind k
  int64_t ldq;      // bytes of a row, a multiple of 16, at least k; aligned to 16
  const float* row_scale;
  const float* bias;  // or null
  Activation activation;
  void* out;  // (m, n) contiguous
  DType out_dtype;
};

using Int8Act = void (*)(const Int8ActArgs&, const cuda::Stream&);

// Up to 16 rows per block: streams the weights, the warps of a block take turns along k.
void int4_int8_few_8x8(const Int8ActArgs& args, const cuda::Stream& stream);
void int4_int8_few_8x16(const Int8ActArgs& args, const cuda::Stream& stream);
void int4_int8_few_16x8(const Int8ActArgs& args, const cuda::Stream& stream);
void int4_int8_few_16x16(const Int8ActArgs& args, const cuda::Stream& stream);
// Many rows: both operands through shared memory, the scales of groups in the main loop.
void int4_int8_gemm_64x64(const Int8ActArgs& args, const cuda::Stream& stream);
void int4_int8_gemm_128x128(const Int8ActArgs& args, const cuda::Stream& stream);

struct Int8ActConfig {
  const char* name;
  int rows, columns;  // of a block
  Int8Act run;
};

// pycompress/ops/cuda/int4_int8.py chooses by name and has the same sizes.
inline constexpr Int8ActConfig kInt8ActConfigs[] = {
    {"few_8x8", 8, 8, int4_int8_few_8x8},       {"few_8x16", 8, 16, int4_int8_few_8x16}, {"few_16x8", 16, 8, int4_int8_few_16x8},
    {"few_16x16", 16, 16, int4_int8_few_16x16}, {"64x64", 64, 64, int4_int8_gemm_64x64}, {"128x128", 128, 128, int4_int8_gemm_128x128},
};

// out[n][k] = w * scale or (u - zero) * scale, rounded to `dtype`; rows of `ldo` elements, a multiple of 8 that is at least k, aligned to
// 16; what lies behind k is overwritten.
void dequantize_cuda(const Weight& weight, DType dtype, void* out, int64_t ldo, const cuda::Stream& stream);

}  // namespace pycompress::weight_only
