// Plain C++: runs everywhere, and is what the vector kernels are read against.
#include "core/float_rows.h"
#include "sparse24_gemm/sparse24_gemm.h"

namespace pycompress::sparse24_gemm {
namespace {

constexpr int kNr = 8, kMr = 4, kMc = 64;

uint32_t word(const uint8_t* p) {
  uint32_t u;
  std::memcpy(&u, p, 4);
  return u;
}

float value(const uint8_t* panel, int i, int c) {
  float f;
  std::memcpy(&f, panel + (i * kNr + c) * 4, 4);
  return f;
}

template <int Kept>
void rows(const float* a, int rows, const uint8_t* panel, int64_t blocks, float* acc) {
  for (int i = 0; i < rows * kNr; ++i) acc[i] = 0.0f;
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr), a += rows * block_depth(Kept))
    for (int i = 0; i < 16; ++i)
      for (int c = 0; c < kNr; ++c) {
        const int k = i / Kept * 4 + (word(panel + (16 * kNr + c) * 4) >> (2 * i) & 3);
        for (int r = 0; r < rows; ++r) acc[r * kNr + c] += a[r * block_depth(Kept) + k] * value(panel, i, c);
      }
}

void store_rows(const float* acc, int rows, int cols, const float* bias, Activation activation, float* out, int64_t ldo) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) out[r * ldo + c] = activate(acc[r * kNr + c] + (bias ? bias[c] : 0.0f), activation);
}

template <int Kept>
void columns(const float* xt, int cols, const uint8_t* panel, int64_t blocks, int outputs, float* c, bool add) {
  for (int o = 0; o < outputs; ++o, c += cols) {
    if (!add)
      for (int m = 0; m < cols; ++m) c[m] = 0.0f;
    for (int64_t b = 0; b < blocks; ++b)
      for (int i = 0; i < 16; ++i) {
        const uint8_t* block = panel + b * block_bytes(kNr);
        const int64_t k = b * block_depth(Kept) + i / Kept * 4 + (word(block + (16 * kNr + o) * 4) >> (2 * i) & 3);
        const float w = value(block, i, o);
        for (int m = 0; m < cols; ++m) c[m] += w * xt[k * cols + m];
      }
  }
}

void transpose(const float* src, int64_t lds, int rows, int64_t count, float* dst, int64_t ldd, int padded) {
  for (int64_t k = 0; k < count; ++k)
    for (int r = 0; r < padded; ++r) dst[k * ldd + r] = r < rows ? src[r * lds + k] : 0.0f;
}

void finish(float* c, int cols, int64_t outputs, const float* bias, Activation activation) {
  for (int64_t o = 0; o < outputs; ++o)
    for (int m = 0; m < cols; ++m) c[o * cols + m] = activate(c[o * cols + m] + (bias ? bias[o] : 0.0f), activation);
}

void turn(const float* c, int cols, int outputs, int rows, const float* bias, Activation activation, float* out, int64_t ldo) {
  for (int m = 0; m < rows; ++m)
    for (int o = 0; o < outputs; ++o) out[m * ldo + o] = activate(c[o * cols + m] + (bias ? bias[o] : 0.0f), activation);
}

}  // namespace

extern const Kernel kScalar;
const Kernel kScalar = {"scalar",
                        Isa::scalar,
                        kNr,
                        kMr,
                        kMc,
                        widen_row,
                        narrow_row,
                        store_rows,
                        transpose,
                        finish,
                        turn,
                        {16, rows<2>, columns<2>},
                        {16, rows<1>, columns<1>}};

}  // namespace pycompress::sparse24_gemm
