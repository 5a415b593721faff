#include "int8_sparse24/int8_sparse24.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"

namespace pycompress::int8_sparse24 {

extern const Kernel kScalar;
#if PC_X86
extern const Kernel kAvx2;
extern const Kernel kAvx512Vbmi, kAvx512Vnni, kAvx512Vnni256;
#if PC_HAVE_AVX_VNNI
extern const Kernel kAvxVnni;
#endif
#elif PC_ARM64
extern const Kernel kNeon;
#if PC_HAVE_NEON_EXTENSIONS
extern const Kernel kNeonDotprod;
#endif
#endif

const KernelList<Kernel>& kernels() {
  static const KernelList<Kernel> list = {
#if PC_X86
      &kAvx512Vbmi, &kAvx512Vnni, &kAvx512Vnni256,
#if PC_HAVE_AVX_VNNI
      &kAvxVnni,
#endif
      &kAvx2,
#elif PC_ARM64
#if PC_HAVE_NEON_EXTENSIONS
      &kNeonDotprod,
#endif
      &kNeon,
#endif
      &kScalar,
  };
  return list;
}

namespace {

// Operand rows that are quantised at a time: half of a 512 KB L2. At least four tiles, so that reading a panel pays.
constexpr int64_t kRowBlockBytes = 256 * 1024;
// Blocks of a panel that are expanded at a time: 1024 k of 2:4, so that a tile of rows (16 KB) and a panel (8 KB) fit L1.
constexpr int64_t kWideBlocks = 32;
// Panels that are walked together: 64 outputs (AVX-512) or 32 (AVX2) of 1024 k are 40 KB packed or 32 KB expanded.
constexpr int64_t kGroup = 4;
// How far ahead the first tile of rows fetches the weights, which then lie in a cache for the others. Instructions in flight reach only 1
// to 2 KB ahead when each weight serves several rows, and the hardware fetches too late from memory: 8 rows of 4096 x 4096 took 2.7
// times as long without. 4 KB is less good, 16 KB not better.
constexpr int64_t kAhead = 8192;

struct Shape {
  int kept;  // as packed: 2 also for 1:4 where the kernel has no path for that
  const Path& path;
  int64_t blocks, padded, row_bytes, panel_bytes, panels;
  Shape(const Kernel& kr, int64_t n, int64_t k, int wanted)
      : kept(wanted == 1 && kr.one.tile ? 1 : 2),
        path(kept == 1 ? kr.one : kr.two),
        blocks(ceil_div(k, block_depth(kept))),
        padded(round_up(blocks * block_depth(kept), path.window)),
        row_bytes(padded / path.window * path.window_bytes),
        panel_bytes(blocks * block_bytes(kr.nr)),
        panels(ceil_div(n, kr.nr)) {}

  int64_t bytes(const Kernel& kr) const { return panels * (panel_bytes + (path.offset ? 4 * kr.nr : 0)); }
  const int32_t* offsets(const void* packed) const {
    return path.offset ? reinterpret_cast<const int32_t*>(static_cast<const char*>(packed) + panels * panel_bytes) : nullptr;
  }
};

// Rows [m0, m0 + count) cut into tiles of equal height: 17 rows are 9 + 8, not 16 + 1.
struct Tiles {
  int64_t count, height, rows;
  Tiles(const Kernel& kr, int64_t rows_) : count(ceil_div(rows_, kr.mr)), height(count ? ceil_div(rows_, count) : 1), rows(rows_) {
    count = ceil_div(rows, height);
  }
  int64_t first(int64_t t) const { return t * height; }
  int size(int64_t t) const { return static_cast<int>(std::min(height, rows - t * height)); }
};

struct Operand {
  uint8_t* data;
  float* scales;
  static int64_t bytes(const Kernel& kr, const Shape& s, int64_t tiles) { return tiles * kr.mr * (s.row_bytes + 4) + 64; }
  Operand(void* memory, const Kernel& kr, const Shape& s, int64_t tiles)
      : data(static_cast<uint8_t*>(memory)), scales(reinterpret_cast<float*>(data + tiles * kr.mr * s.row_bytes)) {}
};

// Row m of x into place r of tile t of `rows` rows.
void load_row(const Kernel& kr, const LinearArgs& p, const Shape& s, int64_t m, int64_t t, int64_t r, int64_t rows, const Operand& a) {
  const float* x;
  if (p.image.image) {
    static thread_local Scratch scratch;
    float* row = scratch.get<float>(static_cast<size_t>(p.k));
    unfold_position(p.image, m, row);
    x = row;
  } else if (p.x_dtype == DType::f32) {
    x = static_cast<const float*>(p.x) + m * p.ldx;
  } else {
    static thread_local Scratch scratch;
    float* wide = scratch.get<float>(static_cast<size_t>(p.k));
    kr.widen(static_cast<const uint16_t*>(p.x) + m * p.ldx, p.x_dtype, p.k, wide);
    x = wide;
  }
  // The same arithmetic as pycompress/ops/affine.py: symmetric_scale, inverse_scale. NaN and Inf poison their row.
  const float amax = p.image.image ? 0.0f : kr.amax(x, p.k);
  const bool finite = amax <= 3.402823466e38f;
  float scale = p.dynamic ? (amax < 0x1p-100f ? 0.0f : amax / 127.0f) : p.x_scale;
  const float inverse = finite && scale > 0.0f ? 1.0f / scale : 0.0f;
  if (!finite) scale = NAN;
  a.scales[t * kr.mr + r] = scale;
  s.path.quantize_row(x, p.k, s.padded, inverse, a.data + t * kr.mr * s.row_bytes + r * s.path.window_bytes, rows * s.path.window_bytes);
}

void load_rows(const Kernel& kr, const LinearArgs& p, const Shape& s, const Tiles& tiles, int64_t m0, int64_t begin, int64_t end,
               const Operand& a) {
  for (int64_t i = begin; i < end; ++i) load_row(kr, p, s, m0 + i, i / tiles.height, i % tiles.height, tiles.size(i / tiles.height), a);
}

void store(const Kernel& kr, const LinearArgs& p, const Shape& s, const int32_t* acc, int rows, int64_t m, int64_t panel,
           const float* row_scale) {
  const int64_t j = panel * kr.nr;
  const int cols = static_cast<int>(std::min<int64_t>(kr.nr, p.n - j));
  const int32_t* off = s.offsets(p.packed);
  const Epilogue e{row_scale, p.scale + j, p.bias ? p.bias + j : nullptr, off ? off + j : nullptr, p.activation};
  if (p.out_dtype == DType::f32 && !p.planes) {
    kr.store_f32(acc, rows, cols, e, static_cast<float*>(p.out) + m * p.n + j, p.n);
    return;
  }
  alignas(64) float wide[kMaxMr * kMaxNr];
  kr.store_f32(acc, rows, cols, e, wide, kMaxNr);
  if (p.planes) {
    for (int c = 0; c < cols; ++c) {
      alignas(64) float column[kMaxMr];
      for (int r = 0; r < rows; ++r) column[r] = wide[r * kMaxNr + c];
      const int64_t at = (j + c) * p.m + m;
      if (p.out_dtype == DType::f32)
        std::memcpy(static_cast<float*>(p.out) + at, column, static_cast<size_t>(rows) * 4);
      else
        kr.narrow(column, rows, p.out_dtype, static_cast<uint16_t*>(p.out) + at);
    }
    return;
  }
  for (int r = 0; r < rows; ++r) kr.narrow(wide + r * kMaxNr, cols, p.out_dtype, static_cast<uint16_t*>(p.out) + (m + r) * p.n + j);
}

// Panels [begin, end) times the rows m0... whose operands lie in a. Panels go in groups: a tile of rows, once in L1, meets all panels
// of a group, which come from L2, and a row of the output gets kGroup * nr values in one place.
void compute(const Kernel& kr, const LinearArgs& p, const Shape& s, const Tiles& tiles, int64_t m0, int64_t begin, int64_t end,
             const Operand& a) {
  const uint8_t* packed = static_cast<const uint8_t*>(p.packed);
  const int64_t tile_bytes = kr.mr * s.row_bytes;
  if (!s.path.expand || tiles.count == 1 || s.blocks == 0) {
    alignas(64) int32_t acc[kMaxMr * kMaxNr];
    for (int64_t j = begin; j < end; j += kGroup)
      for (int64_t t = 0; t < tiles.count; ++t)
        for (int64_t panel = j; panel < std::min(end, j + kGroup); ++panel) {
          s.path.tile(a.data + t * tile_bytes, tiles.size(t), packed + panel * s.panel_bytes, s.blocks, t == 0 ? kAhead : 0, acc);
          store(kr, p, s, acc, tiles.size(t), m0 + tiles.first(t), panel, a.scales + t * kr.mr);
        }
    return;
  }
  static thread_local Scratch scratch;
  const int64_t step = s.blocks <= kWideBlocks ? s.blocks : ceil_div(s.blocks, ceil_div(s.blocks, kWideBlocks));
  const int64_t wide_bytes = round_up(step * s.path.wide_bytes, 64), acc_size = kr.mr * kr.nr;
  char* wide = scratch.get<char>(static_cast<size_t>(kGroup * (wide_bytes + tiles.count * acc_size * 4)));
  int32_t* acc = reinterpret_cast<int32_t*>(wide + kGroup * wide_bytes);
  const int64_t a_block = block_depth(s.kept) / s.path.window * s.path.window_bytes;  // of one row
  for (int64_t j = begin; j < end; j += kGroup) {
    const int64_t group = std::min(kGroup, end - j);
    for (int64_t b = 0; b < s.blocks; b += step) {
      const int64_t count = std::min(step, s.blocks - b);
      for (int64_t g = 0; g < group; ++g)
        s.path.expand(packed + (j + g) * s.panel_bytes + b * block_bytes(kr.nr), count, wide + g * wide_bytes);
      for (int64_t t = 0; t < tiles.count; ++t)
        for (int64_t g = 0; g < group; ++g) {
          int32_t* sums = acc + (t * kGroup + g) * acc_size;
          s.path.tile_wide(a.data + t * tile_bytes + b * a_block * tiles.size(t), tiles.size(t), wide + g * wide_bytes, count, sums, b > 0);
          if (b + count == s.blocks) store(kr, p, s, sums, tiles.size(t), m0 + tiles.first(t), j + g, a.scales + t * kr.mr);
        }
    }
  }
}

// Where a panel keeps value i of its output c.
struct Slot {
  int64_t value, index;  // byte offsets inside the panel
  int shift;
  Slot(int nr, int64_t i, int64_t c) {
    const int64_t step = i % 16 / 4, byte = i % 4;
    value = i / 16 * block_bytes(nr) + step * nr * 4 + c * 4 + byte;
    index = i / 16 * block_bytes(nr) + nr * 16 + c * 4 + byte;
    shift = static_cast<int>(2 * step);
  }
};

}  // namespace

size_t packed_bytes(const Kernel& kernel, int64_t n, int64_t k, int kept) {
  return static_cast<size_t>(Shape(kernel, n, k, kept).bytes(kernel));
}

void pack(const Kernel& kernel, const int8_t* values, const uint8_t* indices, int64_t n, int64_t k, int kept, void* packed) {
  const Shape s(kernel, n, k, kept);
  const int64_t step = s.kept / kept;  // 2: zeros lie between the values
  const int64_t groups = ceil_div(k, 4), count = groups * kept, index_bytes = ceil_div(count, 4);
  std::memset(packed, 0, static_cast<size_t>(s.bytes(kernel)));
  int32_t* sums = const_cast<int32_t*>(s.offsets(packed));
  parallel_for(s.panels, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kernel.nr; j < std::min(n, end * kernel.nr); ++j) {
      uint8_t* panel = static_cast<uint8_t*>(packed) + j / kernel.nr * s.panel_bytes;
      uint32_t sum = 0;  // wraps as the accumulators do
      for (int64_t i = 0; i < count; ++i) {
        const Slot slot(kernel.nr, i * step, j % kernel.nr);
        const int8_t v = values[j * count + i];
        panel[slot.value] = static_cast<uint8_t>(v);
        panel[slot.index] = static_cast<uint8_t>(panel[slot.index] | (indices[j * index_bytes + i / 4] >> (2 * (i % 4)) & 3) << slot.shift);
        if (sums) sum += static_cast<uint32_t>(s.path.offset(v));
      }
      if (sums) sums[j] = static_cast<int32_t>(sum);
    }
  });
}

void unpack(const Kernel& kernel, const void* packed, int64_t n, int64_t k, int kept, int8_t* values, uint8_t* indices) {
  const Shape s(kernel, n, k, kept);
  const int64_t step = s.kept / kept;  // 2: zeros lie between the values
  const int64_t groups = ceil_div(k, 4), count = groups * kept, index_bytes = ceil_div(count, 4);
  std::memset(indices, 0, static_cast<size_t>(n * index_bytes));
  parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const uint8_t* panel = static_cast<const uint8_t*>(packed) + j / kernel.nr * s.panel_bytes;
      for (int64_t i = 0; i < count; ++i) {
        const Slot slot(kernel.nr, i * step, j % kernel.nr);
        values[j * count + i] = static_cast<int8_t>(panel[slot.value]);
        uint8_t& byte = indices[j * index_bytes + i / 4];
        byte = static_cast<uint8_t>(byte | (panel[slot.index] >> slot.shift & 3) << (2 * (i % 4)));
      }
    }
  });
}

void linear(const Kernel& kernel, const LinearArgs& p) {
  if (p.m == 0 || p.n == 0) return;
  const Shape s(kernel, p.n, p.k, p.kept);
  const int threads = num_threads();
  const int64_t block = std::max<int64_t>(4, kRowBlockBytes / std::max<int64_t>(1, s.row_bytes) / kernel.mr) * kernel.mr;
  static thread_local Scratch scratch;
  // Many rows: each thread takes blocks of rows and goes through all panels.
  if (threads > 1 ? p.m >= 4 * kernel.mr * threads : p.m > block) {
    const int64_t mb = even_block(p.m, block, threads, kernel.mr);
    parallel_for(ceil_div(p.m, mb), [&](int64_t begin, int64_t end) {
      Operand a(scratch.get<char>(static_cast<size_t>(Operand::bytes(kernel, s, mb / kernel.mr))), kernel, s, mb / kernel.mr);
      for (int64_t i = begin; i < end; ++i) {
        const Tiles tiles(kernel, std::min(mb, p.m - i * mb));
        load_rows(kernel, p, s, tiles, i * mb, 0, tiles.rows, a);
        compute(kernel, p, s, tiles, i * mb, 0, s.panels, a);
      }
    });
    return;
  }
  // Few rows: quantised once, then the threads share the panels.
  const Tiles tiles(kernel, p.m);
  Operand a(scratch.get<char>(static_cast<size_t>(Operand::bytes(kernel, s, tiles.count))), kernel, s, tiles.count);
  if (threads > 1 && p.m * p.k > 32 * 1024) {  // below that a second fork-join costs more than it saves
    parallel_for(p.m, [&](int64_t begin, int64_t end) { load_rows(kernel, p, s, tiles, 0, begin, end, a); });
  } else {
    load_rows(kernel, p, s, tiles, 0, 0, p.m, a);
  }
  if (threads == 1 || p.m * p.n * p.k < 512 * 1024) {  // about 5 us of work: not worth waking another thread
    compute(kernel, p, s, tiles, 0, 0, s.panels, a);
  } else {
    parallel_for(s.panels, [&](int64_t begin, int64_t end) { compute(kernel, p, s, tiles, 0, begin, end, a); });
  }
}

}  // namespace pycompress::int8_sparse24
