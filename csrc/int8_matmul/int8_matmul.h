// int8 matrix multiplication with an exact int32 sum, and the linear layer built on it.
//
//   sum[m][n] = sum over k of (a[m][k] - za[m]) * b[n][k]            a, b int8; any value from -128 to 127
//   out[m][n] = act(float(sum) * (sa[m] * sb[n]) + bias[n])           one fma, then the activation
//
// Exact for every input while |sum| < 2^31, which K <= 131071 guarantees for za = 0 (128 * 128 * 131071 < 2^31).
// With a zero point |a - za| reaches 255 and |b| <= 127, so K <= 66311.
//
// Shapes: a (M, K), b (N, K) "weight layout", out (M, N). The driver (int8_matmul.cpp) packs b once, turns blocks of
// rows of a into the kernel's operand format, and walks register tiles; a kernel record holds what depends on the ISA.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/dispatch.h"
#include "core/target.h"
#include "core/types.h"

namespace pycompress::int8_matmul {

inline constexpr int kMaxMr = 8;   // rows of the tallest tile
inline constexpr int kMaxNr = 64;  // columns of the widest tile
inline constexpr int64_t kMaxK = 131071;

// How one block of output leaves the int32 tile.
struct Epilogue {
  const float* row_scale;         // sa, one per row of the tile
  const int32_t* row_correction;  // sum is acc - row_correction[m] * column_sum[n], in wrapping int32
  const float* col_scale;         // sb, first column of the tile
  const float* bias;              // or null
  const int32_t* column_sum;      // sum over k of b[n][k]
  Activation activation;
};

struct Kernel {
  const char* name;
  Isa isa;
  int mr;      // rows of a register tile
  int nr;      // columns of a packed panel and of the widest tile
  int nv;      // columns of one vector; the last panel is padded to a multiple of it
  int kr;      // consecutive k of one column that lie together
  int a_size;  // bytes of one element of the a operand: 1 = u8 (a + 128) or s8 (a), 2 = int16 (a - za)

  float (*amax)(const float* x, int64_t k);                           // largest |x|; NaN or Inf if any element is
  void (*range)(const float* x, int64_t k, float* low, float* high);  // min(0, x...) and max(0, x...) of finite x

  // One row into operand format, padded from k to kp with anything (b is zero there). inverse = 1 / scale.
  // q = clamp(round_half_even(x * inverse) + zero_point, quant_min, 127); NaN becomes any value in range.
  void (*quantize_row)(const float* x, int64_t k, int64_t kp, float inverse, int zero_point, int quant_min, void* dst);
  void (*load_row)(const int8_t* a, int64_t k, int64_t kp, int zero_point, void* dst);
  void (*widen)(const void* src, DType dtype, int64_t k, float* dst);  // bf16/f16 to float

  // acc[r][c] = sum over segments s and k of a[s * rows + r][k] * b[...]; `cols` is a multiple of nv, acc has row stride nr.
  // `depth` is the k of one segment, a multiple of kr; b advances through all segments.
  void (*tile)(const void* const* a, int rows, int segments, int64_t depth, const int8_t* b, int cols, int32_t* acc);

  void (*store_f32)(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo);
  void (*narrow)(const float* src, int64_t n, DType dtype, void* dst);  // float to bf16/f16

  // For kernels whose arithmetic needs wider weights than memory holds: a panel is widened once into scratch and then
  // serves all rows of a block. null where the tile takes the packed panel as it is.
  void (*widen_panel)(const int8_t* b, int64_t count, void* wide);
  void (*tile_wide)(const void* const* a, int rows, int segments, int64_t depth, const void* wide, int cols, int32_t* acc);

  bool a_signed = false;  // a_size 1 only: s8 operands, as ARM's dot products want them

  // A panel of a linear layer without the int32 tile in memory, the same bits as tile (or tile_wide) and store_f32: `rows` rows that lie
  // `stride` bytes apart, `used` columns that exist. Perhaps null. Of the activations only relu; the others need too many registers.
  void (*linear)(const void* a, int64_t stride, int64_t rows, int64_t depth, const int8_t* b, int used, const Epilogue& e, float* out,
                 int64_t ldo) = nullptr;
  // amax and quantize_row of many rows of floats that lie ldx elements apart, dynamic and symmetric. Perhaps null.
  void (*quantize_rows)(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp, void* dst, int64_t stride,
                        float* scales) = nullptr;
  void (*activate)(float* y, int64_t rows, int cols, int64_t ld, Activation activation) = nullptr;  // there with `linear`

  // For `linear` on rows in a form of the kernel's own: bytes behind the elements of a row, what is xor-ed to packed weights, and a
  // function that brings rows into that form. Perhaps 0, 0 and null.
  int row_extra = 0;
  uint8_t weight_flip = 0;
  void (*encode_rows)(void* rows, int64_t stride, int64_t count, int64_t k, bool beyond_int8) = nullptr;
  const Kernel* shallow = nullptr;  // takes the place of this kernel where k < kShallow

  // What the tile sums too much, in units of the column sum.
  int32_t correction(int32_t zero_point) const { return a_size == 2 ? 0 : a_signed ? zero_point : 128 + zero_point; }
};

// The dynamic symmetric step of a row and its inverse; the same arithmetic as symmetric_scale and inverse_scale in
// pycompress/ops/affine.py. A row with NaN or Inf gets NaN, and so does its result, as it would in float.
static PC_INLINE float symmetric_scale(float amax, float* inverse) {
  *inverse = 0.0f;
  if (!(amax <= 3.402823466e38f)) return NAN;
  if (amax < 0x1p-100f) return 0.0f;
  const float scale = amax / 127.0f;
  *inverse = 1.0f / scale;
  return scale;
}

// Rows of the next register tile: as few tiles of at most 6 rows as possible, all about equally tall.
static PC_INLINE int next_rows(int64_t left) {
  const int64_t tiles = (left + 5) / 6;
  return static_cast<int>((left + tiles - 1) / tiles);
}

inline constexpr int64_t kShallow = 128;

// From this many rows on, widening a panel costs less than widening in every tile.
inline constexpr int64_t kWidenRows = 24;

const KernelList<Kernel>& kernels();

// Packed weights: panels of nr columns, each [kp / kr][cols][kr] int8, then column sums, int32[round_up(N, nv)] from the next multiple of 4
// on.
size_t packed_bytes(const Kernel& kernel, int64_t n, int64_t k);
void pack(const Kernel& kernel, const int8_t* b, int64_t ldb, int64_t n, int64_t k, void* packed);
void unpack(const Kernel& kernel, const void* packed, int64_t n, int64_t k, int8_t* b);

// out = sum, exact int32. lda and ldo in elements.
void matmul(const Kernel& kernel, int64_t m, int64_t n, int64_t k, const int8_t* a, int64_t lda, const void* packed, int32_t* out,
            int64_t ldo);

struct LinearArgs {
  int64_t m, n, k;
  const void* x;  // (m, k), row stride ldx in elements
  int64_t ldx;
  DType x_dtype;
  const void* packed;
  const float* scale;  // per output column
  const float* bias;   // or null
  bool dynamic;        // per token: x_scale and x_zero_point are not read
  bool asymmetric;     // dynamic only: a zero point per row
  float x_scale;
  int x_zero_point;
  int quant_min;  // -127 (symmetric) or -128
  Activation activation;
  void* out;  // (m, n) contiguous
  DType out_dtype;
};

void linear(const Kernel& kernel, const LinearArgs& args);

}  // namespace pycompress::int8_matmul
