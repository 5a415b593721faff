// Linear layers on int4 weights with a scale, and perhaps a zero point, per group of consecutive k.
//
//   w[n][k] = (u[n][k] - z[n][g]) * s[n][g]      u and z integers from 0 to 15, z = 8 if symmetric; g = k / group
//
//   part[g] = sum over the k of g of q[m][k] * (u - z)              int8 activations: exact in int32
//   part[g] = sum over the k of g of x[m][k] * u - z * sum of x      float activations: float, k ascending, fma
//   out[m][n] = act(a * sx[m] + bias[n])     a = fma(part[g], s[n][g], a) for g ascending; sx = 1 for float activations
//
// Every output is summed in this one order, whatever tile or thread it falls to, so a row's result does not depend on its neighbours.
//
// Shapes: x (M, K), weight (N, K), s and z (N, G), out (M, N). The driver (int4_matmul.cpp) packs the weight once, turns rows of x into
// operands, and calls a kernel for one group of k and one panel of columns at a time.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dispatch.h"
#include "core/target.h"
#include "core/types.h"
#include "int8_matmul/int8_matmul.h"

namespace pycompress::int4_matmul {

inline constexpr int kNr = 64;         // columns of a panel
inline constexpr int kChunk = 32;      // k is padded to a multiple of it with u = 0; 32 * 15 * 128 / 16 lanes stays below 2^15
inline constexpr int kMaxGroup = 128;  // the sum of a group of q still fits int16

// A dword of packed weights holds 8 consecutive k of one column: k = 0..3 in the low nibbles of its bytes, k = 4..7 in the high ones.
// Float kernels take a nibble where it lies, as u * 2^shift, and a row of x that was multiplied by 2^-shift beforehand (exact
// while |x| >= 2^-98); the last one, at the sign bit, is shifted down instead.
inline constexpr int kShift[8] = {0, 8, 16, 24, 4, 12, 20, 0};
inline constexpr int kPosition[8] = {0, 8, 16, 24, 4, 12, 20, 28};

struct Epilogue {
  const float* row_scale;
  const float* bias;  // or null
  Activation activation;
};

// One group of k, one panel of columns, a block of rows.
struct Group {
  const void* rows;        // operand of the first row at this group's first k: int8, or float times 2^-shift
  int64_t row_stride;      // bytes
  const void* sums;        // sum of the first row's group: int32 of q, or float of x
  int64_t sum_stride;      // bytes
  int64_t count;           // rows
  int64_t depth;           // k, a multiple of kChunk, at most kMaxGroup
  const uint32_t* weight;  // [depth / 8][cols]
  int cols;                // a multiple of nv, at most kNr
  const float* scale;      // [cols]
  const uint8_t* zero;     // [cols], or null for 8 everywhere
  float* acc;              // [count][kNr], the sums a

  // For kernels with `fused` only: the first group starts at 0 and need not read acc, the last one stores y and need not write it.
  bool first;
  const Epilogue* last;  // null before the last group
  float* out;            // with `last`: where the first row's first column goes
  int64_t ldo;
  int used;  // columns that exist
};

// Rows of the next register tile: as few tiles of at most 6 rows as possible, all about equally tall.
static PC_INLINE int next_rows(int64_t left) {
  const int64_t tiles = (left + 5) / 6;
  return static_cast<int>((left + tiles - 1) / tiles);
}

struct Kernel {
  const char* name;
  Isa isa;
  int nv;                             // columns of one vector; the last panel is padded to a multiple of it
  const int8_matmul::Kernel* helper;  // amax, widen and narrow of the same instruction set

  // q = clamp(round_half_even(x * inverse), -127, 127), padded from k to kp with zeros; NaN becomes any value in range.
  void (*quantize_row)(const float* x, int64_t k, int64_t kp, float inverse, int8_t* q);
  void (*group_int8)(const Group& g);
  void (*group_float)(const Group& g);
  void (*store)(const float* acc, int64_t rows, int cols, const Epilogue& e, float* out, int64_t ldo);

  bool fused = false;  // group_int8 does what `first` and `last` say, for no activation and relu
};

const KernelList<Kernel>& kernels();

// Packed: per panel and group [depth / 8][cols] dwords and [cols] scales; after all panels the zero points, [panel][group][cols] bytes.
size_t packed_bytes(const Kernel& kernel, int64_t n, int64_t k, int64_t group, bool asymmetric);

// weight: (n, ceil(k / 2)) bytes, even k in the low nibble; zero: (n, groups) bytes or null.
void pack(const Kernel& kernel, const uint8_t* weight, const float* scale, const uint8_t* zero, int64_t n, int64_t k, int64_t group,
          void* packed);
void unpack(const Kernel& kernel, const void* packed, int64_t n, int64_t k, int64_t group, uint8_t* weight, float* scale, uint8_t* zero);

struct LinearArgs {
  int64_t m, n, k, group;
  const void* x;  // (m, k), row stride ldx in elements
  int64_t ldx;
  DType x_dtype;
  const void* packed;
  bool asymmetric;
  const float* bias;      // or null
  bool int8_activations;  // dynamic per row, symmetric; else float
  Activation activation;
  void* out;  // (m, n) contiguous
  DType out_dtype;
};

// A row with NaN or Inf comes out as NaN.
void linear(const Kernel& kernel, const LinearArgs& args);

}  // namespace pycompress::int4_matmul
