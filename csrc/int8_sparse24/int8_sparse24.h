// Linear layer on 2:4 and 1:4 sparse int8 weights with activations quantised per token, exact int32 sums.
//
//   q[m][k]   = clamp(round_half_even(x[m][k] * (1 / sa[m])), -127, 127)
//   sum[m][n] = sum over kept i of q[m][position(n, i)] * value[n][i]
//   out[m][n] = act(float(sum) * (sa[m] * sb[n]) + bias[n])            one fma, then the activation
//
// Of every 4 neighbours along K a row n keeps 2 or 1. A kernel selects the activations that meet the kept weights with a byte shuffle
// and multiplies only those: half or a quarter of the products of a dense kernel.
// Exact while |sum| < 2^31: K <= 262143 (two values of every four, 127 * 128 each).
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dispatch.h"
#include "core/target.h"
#include "core/types.h"
#include "core/unfold.h"

namespace pycompress::int8_sparse24 {

inline constexpr int kMaxMr = 16;  // rows of the tallest tile
inline constexpr int kMaxNr = 16;  // outputs of the widest panel

// k of one packed block: 4 steps of 4 kept values per output, 8 k (2:4) or 16 k (1:4) each.
inline constexpr int block_depth(int kept) { return 64 / kept; }

// Bytes of one block of a panel: values [4 steps][nr][4] int8, then indices [nr][4], where byte b of an output holds in its bits
// 2s, 2s+1 the index of value b of step s. One shift and one mask turn the indices of a panel into a step's shuffle control.
inline constexpr int64_t block_bytes(int nr) { return 20 * nr; }

// Asks for a block of a panel that will be read later. Any address will do.
static PC_INLINE void prefetch_block(const uint8_t* block, int nr) {
#if defined(__GNUC__)
  __asm__("" : "+r"(block));  // GCC would carry a pointer per line through the loop, on the stack
  for (int64_t i = 0; i < block_bytes(nr); i += 64) __builtin_prefetch(block + i);
#else
  (void)block, (void)nr;
#endif
}

struct Epilogue {
  const float* row_scale;  // sa, one per row of the tile
  const float* col_scale;  // sb, first output of the panel
  const float* bias;       // or null
  const int32_t* offsets;  // to take away from the sums, one per output of the panel; null: nothing
  Activation activation;
};

// What a kernel does for one pattern: of every 4 neighbours along K an output keeps `kept`.
struct Path {
  int window;                       // k in one window of an operand row, a power of two
  int window_bytes;                 // more than `window` where it also holds the negatives
  int32_t (*offset)(int8_t value);  // by how much a kept value makes its sum too large, whatever x is; null: by nothing

  // One row into operand format; window w goes to dst + w * stride. Padded from k to kp (whole blocks and windows) with anything.
  void (*quantize_row)(const float* x, int64_t k, int64_t kp, float inverse, uint8_t* dst, int64_t stride);

  // acc[r][c] = sums of `rows` rows and one panel. Windows are interleaved: window w of row r lies at a + (w * rows + r) * window_bytes;
  // acc has stride nr. Weights are fetched `ahead` bytes before they are read; 0: not.
  void (*tile)(const uint8_t* a, int rows, const uint8_t* panel, int64_t blocks, int64_t ahead, int32_t* acc);

  // For kernels that need more work to read a panel than to use it: the panel is expanded once into scratch, and serves all
  // tiles of a block of rows. null where `tile` is as fast. acc is added to if `add`.
  void (*expand)(const uint8_t* panel, int64_t blocks, void* wide);
  void (*tile_wide)(const uint8_t* a, int rows, const void* wide, int64_t blocks, int32_t* acc, bool add);
  int64_t wide_bytes;  // of one expanded block
};

struct Kernel {
  const char* name;
  Isa isa;
  int mr;  // rows of the tallest tile
  int nr;  // outputs of a panel

  float (*amax)(const float* x, int64_t k);                             // largest |x|; NaN or Inf if any element is
  void (*widen)(const void* src, DType dtype, int64_t n, float* dst);   // bf16/f16 to float
  void (*narrow)(const float* src, int64_t n, DType dtype, void* dst);  // float to bf16/f16
  void (*store_f32)(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo);

  Path two;  // 2:4
  Path one;  // 1:4; {} runs it as 2:4, with a zero beside each value
};

const KernelList<Kernel>& kernels();

// Packed weights: panels of nr outputs, each ceil(K / block_depth) blocks, then int32 offsets if the path has them.
// Canonical weights: values (n, ceil(k / 4) * kept) and indices (n, ceil(ceil(k / 4) * kept / 4)), both contiguous, kept = 2 or 1.
size_t packed_bytes(const Kernel& kernel, int64_t n, int64_t k, int kept);
void pack(const Kernel& kernel, const int8_t* values, const uint8_t* indices, int64_t n, int64_t k, int kept, void* packed);
void unpack(const Kernel& kernel, const void* packed, int64_t n, int64_t k, int kept, int8_t* values, uint8_t* indices);

struct LinearArgs {
  int64_t m, n, k;
  int kept;
  const void* x;  // (m, k), row stride ldx in elements
  int64_t ldx;
  DType x_dtype;
  const void* packed;
  const float* scale;  // per output
  const float* bias;   // or null
  bool dynamic;        // per token; otherwise x_scale for all
  float x_scale;
  Activation activation;
  void* out;  // (m, n) contiguous
  DType out_dtype;
  // With an image x and ldx are unused: row m is what position m of an image of finite values sees, k its depth().
  Unfold image = {};
  bool planes = false;  // out is (n, m)
};

void linear(const Kernel& kernel, const LinearArgs& args);

}  // namespace pycompress::int8_sparse24
