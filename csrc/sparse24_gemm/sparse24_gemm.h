// Linear layer on 2:4 and 1:4 sparse float weights.
//
//   out[m][n] = act(bias[n] + sum over kept i of x[m][position(n, i)] * value[n][i])
//
// Of every 4 neighbours along K a row n keeps 2 or 1. Sums are float32, in order of k.
//
// Two ways through the same packed weights:
// - rows: lanes are outputs. A permutation picks, for each output, its activation out of a window. Reads the weights once, best for
//   few rows of x.
// - columns: lanes are rows of x, which is transposed. One broadcast value meets a row of the transposed block at an indexed
//   address; no permutation, bound by loads. Best for many rows.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dispatch.h"
#include "core/target.h"
#include "core/types.h"
#include "core/unfold.h"

namespace pycompress::sparse24_gemm {

inline constexpr int kMaxMr = 16;     // rows of the tallest tile
inline constexpr int kMaxNr = 16;     // outputs of the widest panel
inline constexpr int kMaxCols = 128;  // rows of x that the columns way takes at a time

// k of one packed block: 16 kept values per output.
inline constexpr int block_depth(int kept) { return 64 / kept; }

// Bytes of one block of a panel: values [16][nr] float, then per output a uint32 of 16 indices, the i-th in bits 2i, 2i+1.
inline constexpr int64_t block_bytes(int nr) { return 68 * nr; }

// How far ahead the rows way fetches weights. With two rows of x and more, the instructions in flight reach no more than 1 to 2 KB ahead,
// and the hardware fetches too late from memory: 8 rows of 4096 x 4096 took 2.4 times as long without. 2 KB and 16 KB are less good.
inline constexpr int64_t kAhead = 8192;

// Asks for a block of a panel that will be read later. Any address will do.
static PC_INLINE void prefetch_block(const uint8_t* block, int nr) {
#if defined(__GNUC__)
  __asm__("" : "+r"(block));  // GCC would carry a pointer per line through the loop, on the stack
  for (int64_t i = 0; i < block_bytes(nr); i += 64) __builtin_prefetch(block + i);
#else
  (void)block, (void)nr;
#endif
}

// What a kernel does for one pattern: of every 4 neighbours along K an output keeps `kept`; depth = block_depth(kept).
struct Path {
  int max_rows;  // up to this many rows of x the rows way is faster

  // acc[r][c] = sums of `rows` rows and one panel. Block b of row r lies at a + (b * rows + r) * depth; acc has stride nr.
  void (*rows)(const float* a, int rows, const uint8_t* panel, int64_t blocks, float* acc);
  // c[o][m] (+)= sums of the first `outputs` outputs of a panel; xt is [blocks * depth][cols], c has stride cols.
  void (*columns)(const float* xt, int cols, const uint8_t* panel, int64_t blocks, int outputs, float* c, bool add);
};

struct Kernel {
  const char* name;
  Isa isa;
  int nr;  // outputs of a panel
  int mr;  // rows of the tallest tile
  int mc;  // columns (rows of x) of the widest tile of the columns way; it takes all multiples of 16 up to that

  void (*widen)(const void* src, DType dtype, int64_t n, float* dst);   // bf16/f16 to float
  void (*narrow)(const float* src, int64_t n, DType dtype, void* dst);  // float to bf16/f16

  // out[r][c] = act(acc[r][c] + bias[c])
  void (*store_rows)(const float* acc, int rows, int cols, const float* bias, Activation activation, float* out, int64_t ldo);

  // dst[k][r] = src[r][k] for r < rows and k < count, and 0 for the other r < padded.
  void (*transpose)(const float* src, int64_t lds, int rows, int64_t count, float* dst, int64_t ldd, int padded);
  // c[o][m] = act(c[o][m] + bias[o]) in place
  void (*finish)(float* c, int cols, int64_t outputs, const float* bias, Activation activation);
  // out[m][o] = act(c[o][m] + bias[o])
  void (*turn)(const float* c, int cols, int outputs, int rows, const float* bias, Activation activation, float* out, int64_t ldo);

  Path two;  // 2:4
  Path one;  // 1:4; {} runs it as 2:4, with a zero beside each value
};

const KernelList<Kernel>& kernels();

// Packed weights: panels of nr outputs, each ceil(K / depth) blocks.
// Canonical weights: values (n, ceil(k / 4) * kept) and indices (n, ceil(ceil(k / 4) * kept / 4)), both contiguous, kept = 2 or 1.
size_t packed_bytes(const Kernel& kernel, int64_t n, int64_t k, int kept);
void pack(const Kernel& kernel, const float* values, const uint8_t* indices, int64_t n, int64_t k, int kept, void* packed);
void unpack(const Kernel& kernel, const void* packed, int64_t n, int64_t k, int kept, float* values, uint8_t* indices);

struct LinearArgs {
  int64_t m, n, k;
  int kept;
  const void* x;  // (m, k), row stride ldx in elements
  int64_t ldx;
  DType x_dtype;
  const void* packed;
  const float* bias;  // or null
  Activation activation;
  void* out;  // (m, n) contiguous
  DType out_dtype;
};

void linear(const Kernel& kernel, const LinearArgs& args);

// Convolution with one image: out[n][p] = act(bias[n] + sum over kept i of unfolded[position(n, i)][p] * value[n][i]) for the n output
// channels and l positions; out (n, l) float32, contiguous. The columns way.
struct ConvArgs {
  int64_t n, l;
  int kept;
  Unfold input;
  const void* packed;
  const float* bias;  // or null
  Activation activation;
  float* out;
};

void convolve(const Kernel& kernel, const ConvArgs& args);

}  // namespace pycompress::sparse24_gemm
