// Plain C++: runs everywhere. Four partial sums per output, or the additions would wait for one another.
#include "core/float_rows.h"
#include "int8_weight/int8_weight.h"

namespace pycompress::int8_weight {
namespace {

void dot(const float* x, int64_t ldx, int rows, const int8_t* w, int64_t k, int cols, float (*sums)[kCols]) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) {
      const float* a = x + r * ldx;
      const int8_t* b = w + c * k;
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      int64_t i = 0;
      for (; i + 4 <= k; i += 4)
        for (int j = 0; j < 4; ++j) part[j] += a[i + j] * static_cast<float>(b[i + j]);
      for (; i < k; ++i) part[i % 4] += a[i] * static_cast<float>(b[i]);
      sums[r][c] = (part[0] + part[1]) + (part[2] + part[3]);
    }
}

}  // namespace

extern const Kernel kScalar;
const Kernel kScalar = {"scalar", Isa::scalar, 4, widen_row, narrow_row, dot};

}  // namespace pycompress::int8_weight
