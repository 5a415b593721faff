#include "sparse24_gemm/sparse24_gemm.h"

#include <algorithm>
#include <cstring>

#include "core/cpu_features.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace pycompress::sparse24_gemm {

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

namespace {

// Outputs whose sums for one column tile stay near while all of K passes: 128 * 128 floats are 64 KB of L2.
constexpr int64_t kOutputBlock = 128;

// Caches of 48 KB (Zen 5, Ice Lake and later) hold a tile of 128 rows of x as deep as those of 32 KB hold one of 64. The wider tile
// shares a broadcast weight among twice as many FMAs.
bool large_l1() {
  static const bool large = l1_data_bytes() >= 48 * 1024;
  return large;
}
// Floats of x that stay in L1 while the outputs pass: 32 or 16 KB.
int64_t depth_floats() { return large_l1() ? 8192 : 4096; }

struct Shape {
  int kept;  // as packed: 2 also for 1:4 where the kernel has no path for that
  const Path& path;
  int64_t depth, blocks, padded, panel_bytes, panels;
  Shape(const Kernel& kr, int64_t n, int64_t k, int wanted)
      : kept(wanted == 1 && kr.one.rows ? 1 : 2),
        path(kept == 1 ? kr.one : kr.two),
        depth(block_depth(kept)),
        blocks(ceil_div(k, depth)),
        padded(blocks * depth),
        panel_bytes(blocks * block_bytes(kr.nr)),
        panels(ceil_div(n, kr.nr)) {}
};

// Rows [m, m + rows) of x as float, contiguous or in place. The result is valid until the next call of this thread.
struct Source {
  const float* data;
  int64_t stride;
  Source(const Kernel& kr, const LinearArgs& p, int64_t m, int64_t rows) {
    if (p.x_dtype == DType::f32) {
      data = static_cast<const float*>(p.x) + m * p.ldx;
      stride = p.ldx;
      return;
    }
    static thread_local Scratch scratch;
    float* wide = scratch.get<float>(static_cast<size_t>(rows * p.k));
    for (int64_t r = 0; r < rows; ++r) kr.widen(static_cast<const uint16_t*>(p.x) + (m + r) * p.ldx, p.x_dtype, p.k, wide + r * p.k);
    data = wide;
    stride = p.k;
  }
};

// ---- rows ----------------------------------------------------------------------------------------------------------------------

void store_tile(const Kernel& kr, const LinearArgs& p, const float* acc, int rows, int64_t m, int64_t panel) {
  const int64_t j = panel * kr.nr;
  const int cols = static_cast<int>(std::min<int64_t>(kr.nr, p.n - j));
  const float* bias = p.bias ? p.bias + j : nullptr;
  if (p.out_dtype == DType::f32) {
    kr.store_rows(acc, rows, cols, bias, p.activation, static_cast<float*>(p.out) + m * p.n + j, p.n);
    return;
  }
  alignas(64) float wide[kMaxMr * kMaxNr];
  kr.store_rows(acc, rows, cols, bias, p.activation, wide, kMaxNr);
  for (int r = 0; r < rows; ++r) kr.narrow(wide + r * kMaxNr, cols, p.out_dtype, static_cast<uint16_t*>(p.out) + (m + r) * p.n + j);
}

// Rows [m0, m1) by tiles of equal height.
void rows_way(const Kernel& kr, const LinearArgs& p, const Shape& s, int64_t m0, int64_t m1) {
  const int64_t tiles = ceil_div(m1 - m0, kr.mr), height = ceil_div(m1 - m0, tiles), tile_floats = s.padded * height;
  const auto size = [&](int64_t t) { return static_cast<int>(std::min(height, m1 - m0 - t * height)); };
  static thread_local Scratch scratch;
  float* a = scratch.get<float>(static_cast<size_t>(tiles * tile_floats));
  for (int64_t m = m0; m < m1; ++m) {
    const int64_t t = (m - m0) / height;
    float* dst = a + t * tile_floats + (m - m0) % height * s.depth;
    const Source x(kr, p, m, 1);
    for (int64_t k = 0; k < p.k; k += s.depth, dst += size(t) * s.depth) {
      const int64_t count = std::min(s.depth, p.k - k);
      std::memcpy(dst, x.data + k, static_cast<size_t>(count) * 4);
      std::memset(dst + count, 0, static_cast<size_t>(s.depth - count) * 4);
    }
  }
  const auto panels = [&](int64_t begin, int64_t end) {
    alignas(64) float acc[kMaxMr * kMaxNr];
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t t = 0; t < tiles; ++t) {
        s.path.rows(a + t * tile_floats, size(t), static_cast<const uint8_t*>(p.packed) + panel * s.panel_bytes, s.blocks, acc);
        store_tile(kr, p, acc, size(t), m0 + t * height, panel);
      }
  };
  if ((m1 - m0) * p.n * p.k < 128 * 1024) {  // about 5 us of work: not worth waking another thread
    panels(0, s.panels);
  } else {
    parallel_for(s.panels, panels);
  }
}

// ---- columns -------------------------------------------------------------------------------------------------------------------

// Rows of x cut into tiles, padded to a multiple of 16: of equal width where tiles are wide (144 rows are 80 + 64, not 128 + 16), and
// otherwise as wide as they may be (96 rows are 64 + 32, not 48 + 48: the tiles of 64 rows are the fast ones).
struct Columns {
  int64_t rows, width, tiles;
  Columns(const Kernel& kr, int64_t rows_) : rows(rows_) {
    const int64_t widest = large_l1() ? kr.mc : std::min(kr.mc, 64);
    width = round_up(kr.mc > 64 ? ceil_div(rows, ceil_div(rows, widest)) : std::min<int64_t>(rows, widest), 16);
    tiles = ceil_div(rows, width);
  }
  int size(int64_t t) const { return static_cast<int>(std::min(width, rows - t * width)); }
  int cols(int64_t t) const { return static_cast<int>(round_up(size(t), 16)); }
};

void transpose_tile(const Kernel& kr, const LinearArgs& p, const Shape& s, int64_t m, int rows, int cols, float* xt) {
  const Source x(kr, p, m, rows);
  kr.transpose(x.data, x.stride, rows, p.k, xt, cols, cols);
  std::memset(xt + p.k * cols, 0, static_cast<size_t>((s.padded - p.k) * cols) * 4);
}

void prefetch(const void* p, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
#else
  (void)p, (void)bytes;
#endif
}

// Sums c[o][m] of outputs [j0, j1) for one tile; the block of xt that is being read stays in L1.
void sum_columns(const Kernel& kr, const Shape& s, const uint8_t* packed, const float* xt, int cols, int64_t j0, int64_t j1, float* c) {
  const int64_t step = std::max<int64_t>(1, depth_floats() / (s.depth * cols));
  for (int64_t b = 0; b < s.blocks; b += step) {
    const int64_t count = std::min(step, s.blocks - b);
    for (int64_t j = j0; j < j1; j += kr.nr) {
      const uint8_t* panel = packed + j / kr.nr * s.panel_bytes + b * block_bytes(kr.nr);
      if (j + kr.nr < j1) {  // short pieces far apart: the hardware would find each of them late
        prefetch(panel + s.panel_bytes, count * block_bytes(kr.nr));
      }
      s.path.columns(xt + b * s.depth * cols, cols, panel, count, static_cast<int>(std::min<int64_t>(kr.nr, j1 - j)), c + (j - j0) * cols,
                     b > 0);
    }
  }
  if (s.blocks == 0) std::memset(c, 0, static_cast<size_t>((j1 - j0) * cols) * 4);
}

// Outputs [j0, j1) of the tile of rows m...
void columns_tile(const Kernel& kr, const LinearArgs& p, const Shape& s, int64_t m, int rows, int cols, const float* xt, int64_t j0,
                  int64_t j1) {
  static thread_local Scratch scratch;
  float* c = scratch.get<float>(static_cast<size_t>((p.out_dtype == DType::f32 ? 1 : 2) * kOutputBlock * cols));
  for (int64_t j = j0; j < j1; j += kOutputBlock) {
    const int64_t end = std::min(j1, j + kOutputBlock);
    sum_columns(kr, s, static_cast<const uint8_t*>(p.packed), xt, cols, j, end, c);
    const int count = static_cast<int>(end - j);
    const float* bias = p.bias ? p.bias + j : nullptr;
    if (p.out_dtype == DType::f32) {
      kr.turn(c, cols, count, rows, bias, p.activation, static_cast<float*>(p.out) + m * p.n + j, p.n);
      continue;
    }
    float* wide = c + kOutputBlock * cols;
    kr.turn(c, cols, count, rows, bias, p.activation, wide, kOutputBlock);
    for (int r = 0; r < rows; ++r)
      kr.narrow(wide + r * kOutputBlock, count, p.out_dtype, static_cast<uint16_t*>(p.out) + (m + r) * p.n + j);
  }
}

void columns_way(const Kernel& kr, const LinearArgs& p, const Shape& s, int64_t rows) {
  const Columns c(kr, rows);
  const int64_t tile_floats = s.padded * c.width;
  static thread_local Scratch scratch;
  if (c.tiles >= 2 * num_threads() || num_threads() == 1) {  // enough tiles for everybody
    parallel_for(c.tiles, [&](int64_t begin, int64_t end) {
      float* xt = scratch.get<float>(static_cast<size_t>(tile_floats));
      for (int64_t t = begin; t < end; ++t) {
        transpose_tile(kr, p, s, t * c.width, c.size(t), c.cols(t), xt);
        columns_tile(kr, p, s, t * c.width, c.size(t), c.cols(t), xt, 0, p.n);
      }
    });
    return;
  }
  float* xt = scratch.get<float>(static_cast<size_t>(c.tiles * tile_floats));
  parallel_for(c.tiles, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) transpose_tile(kr, p, s, t * c.width, c.size(t), c.cols(t), xt + t * tile_floats);
  });
  parallel_for(s.panels, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < c.tiles; ++t)
      columns_tile(kr, p, s, t * c.width, c.size(t), c.cols(t), xt + t * tile_floats, begin * kr.nr, std::min(p.n, end * kr.nr));
  });
}

struct Slot {  // where a panel keeps value i of output c
  int64_t value, index;
  int shift;
  Slot(int nr, int64_t i, int64_t c) {
    const int64_t block = i / 16 * block_bytes(nr);
    value = block + (i % 16 * nr + c) * 4;
    index = block + (16 * nr + c) * 4;
    shift = static_cast<int>(2 * (i % 16));
  }
};

}  // namespace

size_t packed_bytes(const Kernel& kernel, int64_t n, int64_t k, int kept) {
  const Shape s(kernel, n, k, kept);
  return static_cast<size_t>(s.panels * s.panel_bytes);
}

void pack(const Kernel& kernel, const float* values, const uint8_t* indices, int64_t n, int64_t k, int kept, void* packed) {
  const Shape s(kernel, n, k, kept);
  const int64_t step = s.kept / kept;  // 2: zeros lie between the values
  const int64_t count = ceil_div(k, 4) * kept, index_bytes = ceil_div(count, 4);
  std::memset(packed, 0, packed_bytes(kernel, n, k, kept));
  parallel_for(s.panels, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kernel.nr; j < std::min(n, end * kernel.nr); ++j) {
      uint8_t* panel = static_cast<uint8_t*>(packed) + j / kernel.nr * s.panel_bytes;
      for (int64_t i = 0; i < count; ++i) {
        const Slot slot(kernel.nr, i * step, j % kernel.nr);
        std::memcpy(panel + slot.value, values + j * count + i, 4);
        uint32_t word;
        std::memcpy(&word, panel + slot.index, 4);
        word |= static_cast<uint32_t>(indices[j * index_bytes + i / 4] >> (2 * (i % 4)) & 3) << slot.shift;
        std::memcpy(panel + slot.index, &word, 4);
      }
    }
  });
}

void unpack(const Kernel& kernel, const void* packed, int64_t n, int64_t k, int kept, float* values, uint8_t* indices) {
  const Shape s(kernel, n, k, kept);
  const int64_t step = s.kept / kept;
  const int64_t count = ceil_div(k, 4) * kept, index_bytes = ceil_div(count, 4);
  std::memset(indices, 0, static_cast<size_t>(n * index_bytes));
  parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const uint8_t* panel = static_cast<const uint8_t*>(packed) + j / kernel.nr * s.panel_bytes;
      for (int64_t i = 0; i < count; ++i) {
        const Slot slot(kernel.nr, i * step, j % kernel.nr);
        std::memcpy(values + j * count + i, panel + slot.value, 4);
        uint32_t word;
        std::memcpy(&word, panel + slot.index, 4);
        uint8_t& byte = indices[j * index_bytes + i / 4];
        byte = static_cast<uint8_t>(byte | (word >> slot.shift & 3) << (2 * (i % 4)));
      }
    }
  });
}

void linear(const Kernel& kernel, const LinearArgs& p) {
  if (p.m == 0 || p.n == 0) return;
  const Shape s(kernel, p.n, p.k, p.kept);
  // Few rows behind a multiple of 16 take the rows way: padding costs as much as eight.
  const int64_t rest = p.m % 16;
  const int64_t columns = p.m <= s.path.max_rows ? 0 : rest <= 8 ? p.m - rest : p.m;
  if (columns > 0) columns_way(kernel, p, s, columns);
  if (columns < p.m) rows_way(kernel, p, s, columns, p.m);
}

void convolve(const Kernel& kernel, const ConvArgs& p) {
  if (p.n == 0 || p.l == 0) return;
  const int64_t k = p.input.depth();
  const Shape s(kernel, p.n, k, p.kept);
  const Columns tiles(kernel, p.l);
  parallel_for(tiles.tiles, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int64_t widest = std::min(kOutputBlock, p.n);
    float* xt = scratch.get<float>(static_cast<size_t>((s.padded + widest) * tiles.width));
    float* c = xt + s.padded * tiles.width;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * tiles.width, count = tiles.size(t);
      const int cols = tiles.cols(t);
      std::memset(xt + (count == cols ? k * cols : 0), 0, static_cast<size_t>((s.padded - (count == cols ? k : 0)) * cols) * 4);
      unfold_positions(p.input, first, count, xt, cols);
      for (int64_t j = 0; j < p.n; j += kOutputBlock) {
        const int64_t outputs = std::min(kOutputBlock, p.n - j);
        sum_columns(kernel, s, static_cast<const uint8_t*>(p.packed), xt, cols, j, j + outputs, c);
        kernel.finish(c, cols, outputs, p.bias ? p.bias + j : nullptr, p.activation);
        for (int64_t o = 0; o < outputs; ++o) std::memcpy(p.out + (j + o) * p.l + first, c + o * cols, static_cast<size_t>(count) * 4);
      }
    }
  });
}

}  // namespace pycompress::sparse24_gemm
