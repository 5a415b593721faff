// Linear layer on int8 weights and float activations, for few rows: reads each weight once, as one byte.
//
//   out[m][n] = (sum over k of x[m][k] * w[n][k]) * scale[n] + bias[n]
//
// Sums are float32: one partial sum per lane, k ascending, reduced at the end. Their order depends on K and the kernel alone, so a row's
// result does not depend on its neighbours or on threads. Weights are (N, K) int8, row-major, as they are stored: nothing is packed.
#pragma once
#include <cstdint>

#include "core/dispatch.h"
#include "core/target.h"
#include "core/types.h"

namespace pycompress::int8_weight {

inline constexpr int kCols = 4;      // rows of the weight per tile
inline constexpr int kMaxRows = 4;   // rows of x per tile, at most
inline constexpr int64_t kPad = 16;  // x is padded with zeros to a multiple of it

struct Kernel {
  const char* name;
  Isa isa;
  int rows;  // rows of x per tile
  void (*widen)(const void* src, DType dtype, int64_t n, float* dst);
  void (*narrow)(const float* src, int64_t n, DType dtype, void* dst);
  // sums[r][c] of `rows` rows of x (stride ldx, padded) and `cols` rows of w (stride k, not padded).
  void (*dot)(const float* x, int64_t ldx, int rows, const int8_t* w, int64_t k, int cols, float (*sums)[kCols]);
};

const KernelList<Kernel>& kernels();

struct LinearArgs {
  int64_t m, n, k;
  const void* x;  // (m, k), row stride ldx in elements
  int64_t ldx;
  DType x_dtype;
  const int8_t* weight;
  const float* scale;
  const float* bias;  // or null
  void* out;          // (m, n) contiguous, x_dtype
};

void linear(const Kernel& kernel, const LinearArgs& args);

}  // namespace pycompress::int8_weight
