#include "int8_weight/int8_weight.h"

#include <algorithm>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"

namespace pycompress::int8_weight {

extern const Kernel kScalar;
#if PC_X86
extern const Kernel kAvx2;
extern const Kernel kAvx512;
#elif PC_ARM64
extern const Kernel kNeon;
#endif

const KernelList<Kernel>& kernels() {
  static const KernelList<Kernel> list = {
#if PC_X86
      &kAvx512,
      &kAvx2,
#elif PC_ARM64
      &kNeon,
#endif
      &kScalar,
  };
  return list;
}

void linear(const Kernel& kernel, const LinearArgs& p) {
  if (p.m == 0 || p.n == 0) return;
  const int64_t padded = (p.k + kPad - 1) / kPad * kPad, size = p.x_dtype == DType::f32 ? 4 : 2;
  static thread_local Scratch scratch;
  float* x = scratch.get<float>(static_cast<size_t>(std::max<int64_t>(1, p.m * padded)));
  for (int64_t m = 0; m < p.m; ++m) {
    const char* from = static_cast<const char*>(p.x) + m * p.ldx * size;
    if (p.x_dtype == DType::f32)
      std::memcpy(x + m * padded, from, static_cast<size_t>(p.k) * 4);
    else
      kernel.widen(from, p.x_dtype, p.k, x + m * padded);
    std::fill(x + m * padded + p.k, x + (m + 1) * padded, 0.0f);
  }
  const auto columns = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t n = tile * kCols;
      const int cols = static_cast<int>(std::min<int64_t>(kCols, p.n - n));
      for (int64_t m = 0; m < p.m; m += kernel.rows) {  // the tile's weights stay in L1
        const int rows = static_cast<int>(std::min<int64_t>(kernel.rows, p.m - m));
        float sums[kMaxRows][kCols];
        kernel.dot(x + m * padded, padded, rows, p.weight + n * p.k, p.k, cols, sums);
        for (int r = 0; r < rows; ++r) {
          for (int c = 0; c < cols; ++c) sums[r][c] = sums[r][c] * p.scale[n + c] + (p.bias ? p.bias[n + c] : 0.0f);
          char* to = static_cast<char*>(p.out) + ((m + r) * p.n + n) * size;
          if (p.x_dtype == DType::f32)
            std::memcpy(to, sums[r], static_cast<size_t>(cols) * 4);
          else
            kernel.narrow(sums[r], cols, p.x_dtype, to);
        }
      }
    }
  };
  const int64_t tiles = (p.n + kCols - 1) / kCols;
  if (p.n * p.k < 64 * 1024)  // about 5 us of work: not worth waking another thread
    columns(0, tiles);
  else
    parallel_for(tiles, columns);
}

}  // namespace pycompress::int8_weight
