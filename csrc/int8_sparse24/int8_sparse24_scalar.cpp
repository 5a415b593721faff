// Plain C++: runs everywhere, and is what the vector kernels are read against.
#include <cmath>

#include "core/float_rows.h"
#include "int8_sparse24/int8_sparse24.h"

namespace pycompress::int8_sparse24 {
namespace {

constexpr int kMr = 4, kNr = 8;

// As an integer, |x| orders like |x| and NaN is the largest.
float amax(const float* x, int64_t k) {
  uint32_t best = 0;
  for (int64_t i = 0; i < k; ++i) {
    uint32_t u;
    std::memcpy(&u, x + i, 4);
    u &= 0x7fffffffu;
    best = u > best ? u : best;
  }
  float f;
  std::memcpy(&f, &best, 4);
  return f;
}

void quantize_row(const float* x, int64_t k, int64_t kp, float inverse, uint8_t* dst, int64_t stride) {
  for (int64_t i = 0; i < kp; ++i) {
    float y = i < k ? x[i] * inverse : 0.0f;
    y = y > -127.0f ? y : -127.0f;  // NaN becomes -127
    y = y < 127.0f ? y : 127.0f;
    dst[i / 16 * stride + i % 16] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(y)));
  }
}

template <int Kept>
void tile(const uint8_t* a, int rows, const uint8_t* panel, int64_t blocks, int64_t, int32_t* acc) {
  for (int i = 0; i < rows * kNr; ++i) acc[i] = 0;
  for (int64_t b = 0; b < blocks; ++b, panel += block_bytes(kNr), a += block_depth(Kept) * rows) {
    const int8_t* values = reinterpret_cast<const int8_t*>(panel);
    const uint8_t* indices = panel + 16 * kNr;
    for (int step = 0; step < 4; ++step)
      for (int c = 0; c < kNr; ++c)
        for (int i = 0; i < 4; ++i) {
          const int k = (step * 4 + i) / Kept * 4 + (indices[c * 4 + i] >> (2 * step) & 3);  // inside the block
          const int value = values[(step * kNr + c) * 4 + i];
          for (int r = 0; r < rows; ++r) acc[r * kNr + c] += value * static_cast<int8_t>(a[(k / 16 * rows + r) * 16 + k % 16]);
        }
  }
}

void store_f32(const int32_t* acc, int rows, int cols, const Epilogue& e, float* out, int64_t ldo) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) {
      const float y = std::fma(static_cast<float>(acc[r * kNr + c]), e.row_scale[r] * e.col_scale[c], e.bias ? e.bias[c] : 0.0f);
      out[r * ldo + c] = activate(y, e.activation);
    }
}

}  // namespace

extern const Kernel kScalar;
const Kernel kScalar = {"scalar",
                        Isa::scalar,
                        kMr,
                        kNr,
                        amax,
                        widen_row,
                        narrow_row,
                        store_f32,
                        {16, 16, nullptr, quantize_row, tile<2>, nullptr, nullptr, 0},
                        {16, 16, nullptr, quantize_row, tile<1>, nullptr, nullptr, 0}};

}  // namespace pycompress::int8_sparse24
