// 3x3 convolutions with stride 1 by Winograd's F(4x4, 3x3) in integers: 36 multiplications for 16 outputs instead of 144, exact.
//
//   Y = A' [ (G g G') * (B' d B) ] A       (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308)
//
// d is a 6x6 patch, g a 3x3 kernel, Y 4x4 outputs. B holds integers. G has rows over 4, 6, 6, 24, 24, 1; each row is scaled to
// integers and the scales move into A, so that the integer result is 24 * 24 * Y = 2^6 * 9 * Y.
//
// Nothing is rounded and nothing saturates: B' d B stays within 100 * 255 and G g G' within 49 * 127, both int16; the sums of
// their products may pass int32, but they wrap, so the result is right modulo 2^32. 9 is odd, hence has an inverse modulo 2^32,
// and the remaining 2^6 * Y gives Y by a shift whenever |Y| < 2^25. winograd_applies() makes sure of that from the weights at
// hand. (Residue arithmetic for Winograd: Liu & Mattina, arXiv:2007.12216.)
//
// The weights stay packed as int8 and are transformed for each block of tiles, 16 columns at a time: the 36 int16 matrices
// would take 8 times the memory, and their transform costs a few percent from a dozen tiles on.
#include <algorithm>
#include <cstring>

#include "core/cpu_features.h"
#include "core/scratch.h"
#include "int8_conv2d/layout.h"

namespace pycompress::int8_conv2d {
namespace {

constexpr int64_t kPositions = 36, kColumns = 16;
constexpr int64_t kTilesPerThread = 24;  // fewer than that, and the threads share the output channels instead

struct Winograd {
  const Kernel& kernel;
  const Args& a;
  const Shape& s;
  const Gemm& gemm;
  Layout layout;
  Sink sink;
  int64_t oh, ow, tiles_h, tiles_w;

  Winograd(const Kernel& kernel_, const Args& args)
      : kernel(kernel_),
        a(args),
        s(args.shape),
        gemm(*kernel_.gemm),
        layout(*kernel_.gemm, args.shape),
        sink(kernel_, args),
        oh(args.shape.out_h()),
        ow(args.shape.out_w()),
        tiles_h(ceil_div(oh, 4)),
        tiles_w(ceil_div(ow, 4)) {}

  // int16 elements between rows of a position, and between positions; the extra line keeps the 36 streams out of one L1 set.
  int64_t ld() const { return s.c % 512 == 0 ? s.c + 32 : s.c; }
  int64_t patch_step(int64_t tiles) const { return tiles * ld() + 32; }
  int64_t weight_step() const { return s.c * kColumns + 32; }

  // Tile rows [g0, g1), counted through all images.
  void block(int64_t g0, int64_t g1, const Image* images, bool parallel, std::atomic<bool>* poisoned) const {
    static thread_local Scratch band_memory, patch_memory;
    const int64_t tiles = (g1 - g0) * tiles_w, step = patch_step(tiles);
    int16_t* patches = patch_memory.get<int16_t>(static_cast<size_t>(kPositions * step));
    const int64_t pixel = s.c * gemm.a_size, cols = tiles_w * 4 + 2, row = Band::row_bytes(cols, pixel);
    const int zero_point = a.dynamic ? 0 : a.x_zero_point;
    for (int64_t g = g0; g < g1;) {
      const int64_t n = g / tiles_h, ty = g % tiles_h, count = std::min(g1 - g, tiles_h - ty), rows = count * 4 + 2;
      const Band band{
          static_cast<char*>(band_memory.get(static_cast<size_t>(rows * row))), row, pixel, ty * 4 - s.pad_h, -s.pad_w, rows, cols};
      fill_band(kernel, a, n, images[n], parallel, band, poisoned);
      maybe_parallel(parallel, count * tiles_w, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          kernel.winograd_input(band.data + t / tiles_w * 4 * row + t % tiles_w * 4 * pixel, row, pixel, s.c, zero_point,
                                patches + ((g - g0) * tiles_w + t) * ld(), step);
      });
      g += count;
    }
    const int64_t wide = kernel.winograd_tile_pair ? 2 * kColumns : kColumns;
    maybe_parallel(parallel, ceil_div(s.o, wide), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) columns(g0, tiles, patches, step, i * wide, std::min(s.o, (i + 1) * wide), images);
    });
  }

  // All tiles of a block, output channels [col, end): one block of 16, or two.
  void columns(int64_t g0, int64_t tiles, const int16_t* patches, int64_t step, int64_t col, int64_t end, const Image* images) const {
    static thread_local Scratch weight_memory, sum_memory, strip_memory;
    const int64_t blocks = ceil_div(end - col, kColumns), block_step = kPositions * weight_step();
    int16_t* u = weight_memory.get<int16_t>(static_cast<size_t>(blocks * block_step));
    float scale[2 * kColumns] = {}, bias[2 * kColumns] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t c = col + b * kColumns, j = c / gemm.nr * gemm.nr, panel_cols = round_up(std::min<int64_t>(gemm.nr, s.o - j), gemm.nv);
      kernel.winograd_weight(static_cast<const int8_t*>(a.packed) + j * layout.k() + (c - j) * gemm.kr, static_cast<int>(panel_cols), s.c,
                             u + b * block_step, weight_step());
    }
    for (int64_t c = col; c < end; ++c) scale[c - col] = a.scale[c], bias[c - col] = a.bias ? a.bias[c] : 0.0f;
    // Groups of equal size: 16 tiles are better done as 8 + 8 than as 12 + 4.
    const int64_t rows = ceil_div(tiles, ceil_div(tiles, kernel.winograd_rows)), sum_step = kPositions * rows * kColumns;
    int32_t* sums = sum_memory.get<int32_t>(static_cast<size_t>(blocks * sum_step));
    float* strip = strip_memory.get<float>(static_cast<size_t>(rows * 16 * kColumns + 16 * kColumns));
    for (int64_t t0 = 0; t0 < tiles; t0 += rows) {
      const int64_t count = std::min(rows, tiles - t0);
      for (int64_t p = 0; p < kPositions; ++p) {
        const int16_t *v = patches + p * step + t0 * ld(), *w = u + p * weight_step();
        int32_t* acc = sums + p * rows * kColumns;
        if (blocks == 2)
          kernel.winograd_tile_pair(v, ld(), static_cast<int>(count), s.c, w, block_step, acc, sum_step);
        else
          kernel.winograd_tile(v, ld(), static_cast<int>(count), s.c, w, acc);
      }
      for (int64_t b = 0; b < blocks; ++b)
        results(g0, t0, count, rows, sums + b * sum_step, strip, col + b * kColumns, scale + b * kColumns, bias + b * kColumns, images);
    }
  }

  // Tiles [t0, t0 + count) of a block from their sums to the result, 16 output channels from `col` on.
  void results(int64_t g0, int64_t t0, int64_t count, int64_t rows, const int32_t* sums, float* strip, int64_t col, const float* scale,
               const float* bias, const Image* images) const {
    const int64_t used = std::min(kColumns, s.o - col), strip_row = rows * 4 * kColumns;
    const bool plain = sink.is_plain() && used == kColumns;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t g = g0 + (t0 + r) / tiles_w, n = g / tiles_h, y0 = g % tiles_h * 4, x0 = (t0 + r) % tiles_w * 4;
      const bool direct = plain && y0 + 4 <= oh && x0 + 4 <= ow;
      kernel.winograd_output(sums + r * kColumns, rows * kColumns, images[n].scale, scale, bias, sink.inner,
                             direct ? sink.plain(n, y0 * ow + x0, col) : strip + r * 4 * kColumns, direct ? ow * s.o : strip_row,
                             direct ? s.o : kColumns);
    }
    // Tiles of one tile row at a time: their pixels are neighbours in the result.
    for (int64_t r = 0; r < count;) {
      const int64_t tx = (t0 + r) % tiles_w, run = std::min(count - r, tiles_w - tx), g = g0 + (t0 + r) / tiles_w;
      const int64_t n = g / tiles_h, y0 = g % tiles_h * 4, x0 = tx * 4, pixels = std::min(run * 4, ow - x0);
      // What was written directly: all but the last tile of a row that sticks out, or everything.
      const int64_t done = plain && y0 + 4 <= oh ? pixels / 4 * 4 : 0;
      for (int64_t y = 0; y < std::min<int64_t>(4, oh - y0); ++y)
        sink.store(n, (y0 + y) * ow + x0 + done, pixels - done, col, used, strip + y * strip_row + (r * 4 + done) * kColumns, kColumns);
      r += run;
    }
  }
};

// Rows of tiles whose transformed input a block may take: what streams from L2, and a little more where transforming the weights once
// more costs more than that.
int64_t rows_per_block(const Shape& s) {
  const int64_t bytes = (s.c < 192 ? 640 : 1024) * 1024;
  const int64_t rows = s.n * ceil_div(s.out_h(), 4), tiles = ceil_div(s.out_w(), 4);
  return std::clamp<int64_t>(bytes / (kPositions * 2 * s.c) / tiles, 1, rows);
}

}  // namespace

bool winograd_applies(const Kernel& kernel, const Args& a) {
  const Shape& s = a.shape;
  if (kernel.winograd_rows == 0 || s.kh != 3 || s.kw != 3 || s.stride_h != 1 || s.stride_w != 1 || s.dilation_h != 1 || s.dilation_w != 1 ||
      s.groups != 1 || s.c % kernel.gemm->kr)
    return false;
  // |sum| for operands between -below and above: the positive weights meet one end, the negative ones the other.
  const int64_t zero_point = a.dynamic ? 0 : a.x_zero_point, above = 127 - zero_point;
  const int64_t below = zero_point - (a.x_type == Element::i8 ? -128 : a.quant_min);
  const Layout layout(*kernel.gemm, s);
  const int32_t *sums = weight_sums(a, layout), *magnitudes = weight_magnitudes(a, layout);
  for (int64_t o = 0; o < s.o; ++o) {
    const int64_t positive = (static_cast<int64_t>(magnitudes[o]) + sums[o]) / 2, negative = magnitudes[o] - positive;
    if (std::max(above * positive + below * negative, below * positive + above * negative) >= int64_t{1} << 25) return false;
  }
  return true;
}

bool winograd_pays(const Kernel& kernel, const Args& a) {
  const Shape& s = a.shape;
  const double tiles = static_cast<double>(s.n * ceil_div(s.out_h(), 4) * ceil_div(s.out_w(), 4)), c = static_cast<double>(s.c),
               o = static_cast<double>(round_up(s.o, kColumns)), pixels = static_cast<double>(s.n * s.out_h() * s.out_w());
  const double blocks = static_cast<double>(ceil_div(s.n * ceil_div(s.out_h(), 4), rows_per_block(s)));
  static const bool intel = std::strcmp(cpu_vendor(), "GenuineIntel") == 0;
  const Kernel::Cost& cost = intel && kernel.cost_intel ? *kernel.cost_intel : kernel.cost;
  return tiles * (36 * c * o * cost.gemm + c * cost.input + o * cost.output) + blocks * c * o * cost.weight <
         pixels * 9 * c * o * cost.direct;
}

void winograd(const Kernel& kernel, const Args& a, const Image* images, bool parallel, std::atomic<bool>* poisoned) {
  const Winograd job(kernel, a);
  const int64_t threads = parallel ? num_threads() : 1, rows = a.shape.n * job.tiles_h, tiles = rows * job.tiles_w;
  int64_t per_block = rows_per_block(a.shape);
  const bool split = threads > 1 && tiles >= threads * kTilesPerThread && rows >= threads;
  int64_t blocks = ceil_div(rows, per_block);
  if (split) blocks = std::min(rows, round_up(blocks, threads));
  per_block = ceil_div(rows, blocks);
  maybe_parallel(split, ceil_div(rows, per_block), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      job.block(i * per_block, std::min(rows, (i + 1) * per_block), images, parallel && !split, poisoned);
  });
}

}  // namespace pycompress::int8_conv2d
