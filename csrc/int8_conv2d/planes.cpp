// Planes to planes with pixels in the lanes (planes.h): a GEMM whose operands need no transposition and whose results need none either.
//
// A block of quantised rows holds planes of dwords: four channels of a pixel, or, of few channels, four taps of one channel. What 16
// neighbouring outputs need of one dword of weights is one load. With a stride that takes a plane for each phase of rows and each kernel
// column; without one, all kernel columns read the same plane, whose rows then have the halo of the window between them: an output
// vector may run from one row into the next, and leaves out what lies between.
#include "int8_conv2d/planes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/scratch.h"
#include "int8_conv2d/layout.h"

namespace pycompress::int8_conv2d {
namespace {

constexpr int64_t kBlockBytes = 256 * 1024;  // half of a 512 KB L2; the rest is for weights and results
constexpr int64_t kTapRowBytes = 8 * 1024;   // bytes of one channel that are quantised before taps are gathered out of them
constexpr int64_t kTileVectors = kPlaneVectors, kTileBytes = kTileVectors * 64;

// Up to 8 output channels that share their operands.
struct Chunk {
  int64_t channel;
  int count;
  int64_t a;  // bytes from the start of the block
  const int8_t* b;
  const int64_t* b_steps;
};

struct Planes {
  const Kernel& kernel;
  const PlaneKernel& planes;
  const Args& a;
  const Shape& s;
  Layout layout;
  Sink sink;
  int64_t oh, ow, group_channels, group_cols;
  bool by_taps;     // a dword is four taps of one channel, else four channels of one pixel
  int64_t quads;    // planes of dwords
  int64_t parts;    // dwords of one kernel row of a channel, by taps
  bool by_tiles;    // 1x1 on whole planes: dwords lie in the order of tiles, so that these read memory from one end to the other
  bool by_columns;  // a plane for each kernel column
  int64_t columns, pitch;
  int nothing;
  // One row of a plane: dwords of padding on both sides, where the first pixel of the input (or its odd one) goes.
  struct Line {
    int64_t left, right, first;
    bool odd;
  };
  std::vector<Line> lines;     // one per plane of a quad and phase of rows
  int64_t pixels = 0;          // of an input row that any of them wants
  std::vector<bool> row_used;  // phases of rows that are quantised

  Planes(const Kernel& kernel_, const Args& args)
      : kernel(kernel_),
        planes(*kernel_.planes),
        a(args),
        s(args.shape),
        layout(*kernel_.gemm, args.shape),
        sink(kernel_, args),
        oh(args.shape.out_h()),
        ow(args.shape.out_w()),
        group_channels(args.shape.c / args.shape.groups),
        group_cols(args.shape.o / args.shape.groups),
        by_taps(!dwords_fit(*kernel_.gemm, args.shape)),
        quads(by_taps ? args.shape.c * ceil_div(args.shape.kw, 4) : ceil_div(args.shape.c, 4)),
        parts(ceil_div(args.shape.kw, 4)),
        by_tiles(args.shape.taps() == 1 && args.shape.stride_h == 1 && args.shape.stride_w == 1 && args.shape.pad_h == 0 &&
                 args.shape.pad_w == 0 && args.x_stride[2] == args.shape.w && !by_taps),
        by_columns(args.shape.stride_w > 1 && !by_taps),
        columns(by_columns ? args.shape.kw : 1),
        pitch(by_taps || by_columns ? ow : ow + (args.shape.kw - 1) * args.shape.dilation_w),
        nothing(kernel_.gemm->correction(args.dynamic ? 0 : args.x_zero_point)),
        row_used(static_cast<size_t>(args.shape.stride_h)) {
    // With a dilation some phases may be wanted by no kernel row, but NaN in them counts, too (1x1: measure_images has looked).
    for (int64_t phase = 0; phase < (s.kh == 1 ? 1 : s.stride_h); ++phase) row_used[static_cast<size_t>(phase)] = true;
    for (int64_t i = 0; i < columns && !by_taps; ++i) {
      const int64_t sw = s.stride_w, shift = i * s.dilation_w - s.pad_w, odd = (shift % sw + sw) % sw, first = (odd - shift) / sw;
      const int64_t left = std::clamp<int64_t>(first, 0, pitch), end = std::clamp<int64_t>(first + ceil_div(s.w - odd, sw), left, pitch);
      lines.push_back({left, pitch - end, first, odd != 0});
      if (end > left) pixels = std::max(pixels, (end - 1 - first) * sw + odd + 1);
    }
  }

  // Whether packed weights have the four channels of a dword together.
  static bool dwords_fit(const Gemm& gemm, const Shape& s) {
    const bool together = s.c / s.groups % 4 == 0 || (s.groups == 1 && (s.kw == 1 || !Layout(gemm, s).rows));
    return together && s.stride_w <= 2;
  }

  int64_t window_h() const { return (s.kh - 1) * s.dilation_h + 1; }
  int64_t in_rows(int64_t out_rows) const { return (out_rows - 1) * s.stride_h + window_h(); }
  // Bytes of a plane. Not a multiple of 4 KB, where all planes would fall into the same sets of L1.
  int64_t plane_bytes(int64_t out_rows) const {
    const int64_t bytes = round_up(((out_rows + (s.kh - 1) * s.dilation_h / s.stride_h) * pitch + 64) * 4, 64);
    return bytes % 1024 == 0 ? bytes + 64 : bytes;
  }
  int64_t quad_bytes(int64_t out_rows) const { return by_tiles ? kTileBytes : plane_bytes(out_rows) * s.stride_h * columns; }
  int64_t block_bytes(int64_t out_rows) const {
    return quads * quad_bytes(out_rows) * (by_tiles ? ceil_div(vector_count(out_rows), kTileVectors) : 1);
  }
  int64_t steps() const { return by_taps ? s.kh * group_channels * parts : s.taps() * ceil_div(group_channels, 4); }

  // Byte offsets of the steps of one group, from its first plane on.
  void a_steps(int64_t out_rows, int64_t* steps) const {
    const int64_t plane = plane_bytes(out_rows), quad = quad_bytes(out_rows);
    for (int64_t ky = 0; ky < s.kh; ++ky) {
      const int64_t y = ky * s.dilation_h, row = y % s.stride_h * columns * plane + y / s.stride_h * pitch * 4;
      if (by_taps) {
        for (int64_t i = 0; i < group_channels * parts; ++i) *steps++ = row + i * quad;
        continue;
      }
      for (int64_t kx = 0; kx < s.kw; ++kx) {
        const int64_t tap = row + (by_columns ? kx * plane : kx * s.dilation_w * 4);
        for (int64_t i = 0; i < ceil_div(group_channels, 4); ++i) *steps++ = tap + i * quad;
      }
    }
  }

  // Packed panels as they are: offsets of the steps, `width` columns to a row.
  void packed_steps(int64_t width, int64_t* steps) const {
    for (int64_t t = 0; t < s.taps(); ++t)
      for (int64_t c = 0; c < group_channels; c += 4) *steps++ = layout.position(s, t, c) / 4 * width * 4;
  }
  int64_t panel_width(int64_t j) const { return round_up(std::min<int64_t>(kernel.gemm->nr, layout.cols - j), kernel.gemm->nv); }

  // Weights by taps: [group][step][column] dwords, out of the packed ones.
  int64_t tap_columns() const { return round_up(group_cols, kPlaneChannels); }
  void tap_weights(int8_t* dst) const {
    const int64_t columns = tap_columns(), nr = kernel.gemm->nr;
    std::memset(dst, 0, static_cast<size_t>(s.groups * steps() * columns * 4));
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t t = 0; t < s.taps(); ++t)
        for (int64_t c = 0; c < group_channels; ++c) {
          const int64_t m = g % layout.merged, k = layout.position(s, t, m * group_channels + c);
          const int64_t step = (t / s.kw * group_channels + c) * parts + t % s.kw / 4;
          int8_t* to = dst + (g * steps() + step) * columns * 4 + t % s.kw % 4;
          for (int64_t first = 0; first < group_cols; first += nr) {
            const int64_t col = m * group_cols + first, j = col / nr * nr, width = panel_width(j);
            const int8_t* from = static_cast<const int8_t*>(a.packed) + g / layout.merged * layout.set_bytes + j * layout.k() +
                                 (k / 4 * width + col - j) * 4 + k % 4;
            for (int64_t i = 0; i < std::min(nr, group_cols - first); ++i) to[(first + i) * 4] = from[i * 4];
          }
        }
  }

  // Everything that depends on the height of blocks only.
  struct Plan {
    std::vector<int64_t> a_steps, b_steps[2];
    std::vector<Chunk> chunks;
    std::vector<PlaneVector> vectors;
  };

  Plan plan(int64_t out_rows, const int8_t* taps) const {
    Plan p;
    p.a_steps.resize(static_cast<size_t>(steps()));
    a_steps(out_rows, p.a_steps.data());
    const int64_t nr = kernel.gemm->nr, last = (layout.cols - 1) / nr * nr;
    for (int i = 0; i < 2; ++i) {
      p.b_steps[i].resize(p.a_steps.size());
      if (by_taps)
        for (int64_t k = 0; k < steps(); ++k) p.b_steps[i][static_cast<size_t>(k)] = k * tap_columns() * 4;
      else
        packed_steps(panel_width(i ? last : 0), p.b_steps[i].data());
    }
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t c = 0; c < group_cols; c += kPlaneChannels) {
        const int64_t m = g % layout.merged, col = m * group_cols + c, j = col / nr * nr;
        const int8_t* b = by_taps ? taps + (g * steps() * tap_columns() + c) * 4
                                  : static_cast<const int8_t*>(a.packed) + g / layout.merged * layout.set_bytes + j * layout.k() +
                                        (m * group_channels / 4 * panel_width(j) + col - j) * 4;
        p.chunks.push_back({g * group_cols + c, static_cast<int>(std::min<int64_t>(kPlaneChannels, group_cols - c)),
                            g * (by_taps ? group_channels * parts : group_channels / 4) * quad_bytes(out_rows), b,
                            p.b_steps[j == last].data()});
      }
    vectors(out_rows, p.vectors);
    return p;
  }

  // Through the rows without regard to their ends, or each row by itself: whatever takes fewer vectors.
  int64_t vector_count(int64_t rows) const {
    return std::min(ceil_div((rows - 1) * pitch + ow, planes.lanes), rows * ceil_div(ow, planes.lanes));
  }
  // Tiles of equal size: 4 vectors are better done as 2 + 2 than as 3 + 1. The first vector of tile t:
  static int64_t tile_begin(int64_t t, int64_t tiles, int64_t vectors) { return t * vectors / tiles; }

  void vectors(int64_t rows, std::vector<PlaneVector>& list) const {
    const int64_t lanes = planes.lanes, total = (rows - 1) * pitch + ow, n = vector_count(rows), tiles = ceil_div(n, kTileVectors);
    const bool by_row = n < ceil_div(total, lanes) || ow % lanes == 0;
    list.reserve(static_cast<size_t>(n));
    int64_t done = 0, column = 0;  // of the first lane, in its row
    for (int64_t position = 0; position < total;) {
      const int64_t width = std::min(lanes, by_row ? ow - column : total - position);
      uint32_t keep = 0;
      for (int64_t i = 0; i < width;) {
        const int64_t run = std::clamp<int64_t>(ow - column, 0, width - i), step = std::min(pitch - column, width - i);
        keep |= ((1u << run) - 1) << i;
        i += step, column += step, done += run;
        if (column == pitch) column = 0;
      }
      list.push_back({position * 4, done, static_cast<uint16_t>(keep)});
      position += width;
      if (by_row && column == ow) position += pitch - ow, column = 0;
    }
    for (size_t v = list.size(); v-- > 1;) list[v].out = list[v - 1].out;
    list[0].out = 0;
    if (!by_tiles) return;
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t v = tile_begin(t, tiles, n); v < tile_begin(t + 1, tiles, n); ++v)
        list[static_cast<size_t>(v)].a = t * quads * kTileBytes + (v - tile_begin(t, tiles, n)) * 64;
  }

  void fill(char* dst, int64_t dwords) const {
    int32_t* d = reinterpret_cast<int32_t*>(dst);
    const int32_t value = static_cast<int32_t>(static_cast<uint32_t>(nothing & 255) * 0x01010101u);
    for (int64_t i = 0; i < dwords; ++i) d[i] = value;
  }
  const char* element(int64_t n, int64_t c, int64_t h) const {
    const int64_t size = a.x_type == Element::f32 ? 4 : 2;
    return static_cast<const char*>(a.x) + (n * a.x_stride[0] + c * a.x_stride[1] + h * a.x_stride[2]) * size;
  }

  // `run` pixels of four channels as float32, from row h on; `step` becomes the distance of the channels.
  const float* four_channels(int64_t n, int64_t q, int64_t h, int64_t channels, int64_t run, int64_t* step) const {
    static thread_local Scratch wide_memory;
    *step = a.x_stride[1];
    if (a.x_type == Element::f32) return reinterpret_cast<const float*>(element(n, q * 4, h));
    float* wide = wide_memory.get<float>(static_cast<size_t>(4 * run));
    for (int64_t c = 0; c < channels; ++c) kernel.gemm->widen(element(n, q * 4 + c, h), static_cast<DType>(a.x_type), run, wide + c * run);
    *step = run;
    return wide;
  }

  // One plane of dwords of four channels: `height` rows of the input from h0 on.
  float quad(int64_t n, int64_t q, const Image& image, int64_t h0, int64_t height, int64_t plane, const PlaneVector* vectors,
             char* dst) const {
    static thread_local Scratch target_memory;
    const int64_t channels = std::min<int64_t>(4, s.c - q * 4), sh = s.stride_h, line = pitch * 4;
    const int zero_point = a.dynamic ? 0 : a.x_zero_point;
    DwordTarget* targets = target_memory.get<DwordTarget>(lines.size());
    int64_t step;
    if (by_tiles) {
      const float* x = four_channels(n, q, h0, channels, height * s.w, &step);
      targets[0] = {dst, 0, false};
      return planes.quantize_dwords(x, step, 0, channels, 1, height * s.w, 1, image.inverse, zero_point, a.quant_min, targets, 1, 0,
                                    vectors);
    }
    float bad = 0.0f;
    for (int64_t phase = 0; phase < std::min(sh, height); ++phase) {
      if (!row_used[static_cast<size_t>(phase)]) continue;
      // Rows [r0, r1) of the phase lie in the image.
      const int64_t rows = ceil_div(height - phase, sh), r0 = std::clamp<int64_t>(ceil_div(-h0 - phase, sh), 0, rows),
                    r1 = pixels ? std::clamp<int64_t>(ceil_div(s.h - h0 - phase, sh), r0, rows) : r0;
      char* first = dst + phase * columns * plane;
      // Vectors spill over the end of a row into the next one, so what lies around the pixels is written last.
      const int64_t at_once = a.x_type == Element::f32 ? std::max<int64_t>(r1 - r0, 1) : 1;
      for (int64_t r = r0; r < r1; r += at_once) {
        const float* x = four_channels(n, q, h0 + phase + r * sh, channels, pixels, &step);
        int64_t count = 0;
        for (size_t i = 0; i < lines.size(); ++i)
          if (lines[i].left + lines[i].right < pitch)
            targets[count++] = {first + static_cast<int64_t>(i) * plane + r * line + lines[i].first * 4,
                                std::max<int64_t>(-lines[i].first, 0), lines[i].odd};
        bad += planes.quantize_dwords(x, step, a.x_stride[2] * sh, channels, at_once, pixels, s.stride_w, image.inverse, zero_point,
                                      a.quant_min, targets, count, line, nullptr);
      }
      for (size_t i = 0; i < lines.size(); ++i) {
        char* row = first + static_cast<int64_t>(i) * plane;
        fill(row, r0 * pitch);
        for (int64_t r = r0; r < r1; ++r) {
          fill(row + r * line, lines[i].left);
          fill(row + (r + 1) * line - lines[i].right * 4, lines[i].right);
        }
        fill(row + r1 * line, (rows - r1) * pitch);
      }
    }
    return bad;
  }

  // All dwords of taps of one channel.
  float taps_of_channel(int64_t n, int64_t c, const Image& image, int64_t h0, int64_t height, int64_t plane, const Taps& taps,
                        char* dst) const {
    static thread_local Scratch byte_memory, wide_memory;
    const int64_t group = std::max<int64_t>(1, kTapRowBytes / s.w), zero_point = a.dynamic ? 0 : a.x_zero_point;
    char* bytes = byte_memory.get<char>(static_cast<size_t>(taps.before() + group * s.w + taps.behind(ow) + 64)) + taps.before();
    float* wide = a.x_type == Element::f32 ? nullptr : wide_memory.get<float>(static_cast<size_t>(group * s.w));
    float bad = 0.0f;
    const auto row_of = [&](int64_t r) { return dst + r % s.stride_h * plane + r / s.stride_h * pitch * 4; };
    for (int64_t r0 = 0; r0 < height; r0 += group) {
      const int64_t r1 = std::min(height, r0 + group);
      const int64_t top = std::clamp<int64_t>(-h0, r0, r1), bottom = std::clamp<int64_t>(s.h - h0, top, r1);
      const int64_t at_once = a.x_stride[2] == s.w ? std::max<int64_t>(bottom - top, 1) : 1;
      for (int64_t r = top; r < bottom; r += at_once) {
        const float* x = reinterpret_cast<const float*>(element(n, c, h0 + r));
        if (wide) kernel.gemm->widen(x, static_cast<DType>(a.x_type), at_once * s.w, wide), x = wide;
        bad += planes.quantize_bytes(x, at_once * s.w, image.inverse, static_cast<int>(zero_point), a.quant_min, bytes + (r - r0) * s.w);
      }
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t r = r0; r < r1; ++r) {
          char* row = row_of(r) + part * s.stride_h * plane;
          if (h0 + r < 0 || h0 + r >= s.h)
            fill(row, pitch);
          else
            planes.gather(bytes + (r - r0) * s.w, taps, part, ow, row);
        }
    }
    return bad;
  }

  // Output rows [y0, y1) of image n.
  void block(int64_t n, int64_t y0, int64_t y1, const Image& image, const Plan& plan, const Taps* taps, bool parallel,
             std::atomic<bool>* poisoned) const {
    static thread_local Scratch block_memory;
    const int64_t rows = y1 - y0, plane = plane_bytes(rows), quad_step = quad_bytes(rows), height = in_rows(rows);
    char* data = block_memory.get<char>(static_cast<size_t>(block_bytes(rows)));
    const int64_t h0 = y0 * s.stride_h - s.pad_h, sources = by_taps ? s.c : quads;
    maybe_parallel(parallel, sources, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float bad = by_taps ? taps_of_channel(n, i, image, h0, height, plane, *taps, data + i * parts * quad_step)
                                  : quad(n, i, image, h0, height, plane, plan.vectors.data(), data + i * quad_step);
        if (!a.dynamic && std::isnan(bad)) poisoned[n].store(true, std::memory_order_relaxed);
      }
    });
    const int64_t n_vectors = static_cast<int64_t>(plan.vectors.size()), tiles = ceil_div(n_vectors, kTileVectors);
    const int64_t chunks = static_cast<int64_t>(plan.chunks.size()),
                  cuts = parallel ? std::min(chunks, ceil_div(4 * num_threads(), tiles)) : 1;
    maybe_parallel(parallel, tiles * cuts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / cuts, cut = i % cuts;
        tile(n, y0 * ow, data, image.scale, plan, tile_begin(t, tiles, n_vectors), tile_begin(t + 1, tiles, n_vectors), cut * chunks / cuts,
             (cut + 1) * chunks / cuts);
      }
    });
  }

  // Vectors [v0, v1) of a block, chunks [c0, c1).
  void tile(int64_t n, int64_t first_pixel, const char* data, float image_scale, const Plan& plan, int64_t v0, int64_t v1, int64_t c0,
            int64_t c1) const {
    const bool straight = a.out_type == Element::f32 && !a.residual;
    constexpr int64_t kStrip = kPlaneVectors * 16;
    float strip[kPlaneChannels * kStrip];
    const char* x[kPlaneVectors];
    float* out[kPlaneVectors];
    uint16_t keep[kPlaneVectors];
    const PlaneVector* vectors = plan.vectors.data() + v0;
    const int64_t used = v1 - v0;
    int64_t results = vectors[used - 1].out - vectors[0].out;
    for (int64_t v = 0; v < used; ++v) keep[v] = vectors[v].keep;
    for (int i = 0; i < 16; ++i) results += keep[used - 1] >> i & 1;
    PlaneTile t{x,
                static_cast<int>(used),
                plan.a_steps.data(),
                nullptr,
                steps(),
                nullptr,
                0,
                nothing,
                nullptr,
                image_scale,
                nullptr,
                nullptr,
                sink.inner,
                keep,
                out,
                straight ? sink.plane : kStrip};
    for (int64_t c = c0; c < c1; ++c) {
      const Chunk& chunk = plan.chunks[static_cast<size_t>(c)];
      const int64_t o = chunk.channel, first = (n * s.o + o) * sink.plane + first_pixel + vectors[0].out;
      float* to = straight ? static_cast<float*>(a.out) + first : strip;
      for (int64_t v = 0; v < used; ++v) x[v] = data + chunk.a + vectors[v].a, out[v] = to + vectors[v].out - vectors[0].out;
      t.b = chunk.b, t.b_steps = chunk.b_steps, t.channels = chunk.count, t.column_sum = weight_sums(a, layout) + o;
      t.scale = a.scale + o, t.bias = a.bias ? a.bias + o : nullptr;
      planes.tile(t);
      for (int r = 0; r < chunk.count && !straight; ++r) sink.store_run(strip + r * kStrip, first + r * sink.plane, results);
    }
  }
};

}  // namespace

bool planes_apply(const Kernel& kernel, const Args& a) {
  const Shape& s = a.shape;
  if (!kernel.planes || a.x_channels_last || a.out_channels_last || a.x_type == Element::i8 || is_depthwise(s)) return false;
  return Planes::dwords_fit(*kernel.gemm, s) || Taps::fit(s);
}

// Products and what is beside them, in lanes that hold results: columns are padded to vectors the direct way, pixels this way.
// Transposing a result costs the direct way as much as kTransposed products (measured: 0.3 to 0.6 cycles). Deep windows cost this
// way kDeep: their weights no longer stay in L1, and of the lines they come in a tile reads a half.
bool planes_pay(const Kernel& kernel, const Args& a) {
  constexpr double kTransposed = 55, kDeep = 1.1;
  constexpr int64_t kDeepSteps = 128;
  const Planes job(kernel, a);
  const double pixels = static_cast<double>(job.oh * job.ow), o = static_cast<double>(a.shape.o);
  const double direct_columns = static_cast<double>(job.layout.sets * round_up(job.layout.cols, kernel.gemm->nv)),
               columns = static_cast<double>(a.shape.groups * round_up(job.group_cols, kPlaneChannels / 2)),
               lanes = static_cast<double>(job.vector_count(job.oh) * kernel.planes->lanes);
  const double factor = job.steps() > kDeepSteps ? kDeep : 1.0;
  return columns * lanes * static_cast<double>(4 * job.steps()) * factor <
         pixels * (direct_columns * static_cast<double>(job.layout.k()) + o * kTransposed);
}

void planes(const Kernel& kernel, const Args& a, const Image* images, bool parallel, std::atomic<bool>* poisoned) {
  const Planes job(kernel, a);
  const Shape& s = a.shape;
  static thread_local Scratch tap_memory;
  int8_t* weights = nullptr;
  std::vector<uint64_t> inside(static_cast<size_t>(job.by_taps ? Taps::inside_size(s, job.ow) : 0));
  std::vector<Taps> taps;
  if (job.by_taps) {
    weights = tap_memory.get<int8_t>(static_cast<size_t>(s.groups * job.steps() * job.tap_columns() * 4));
    job.tap_weights(weights);
    taps.emplace_back(s, job.ow, job.nothing, inside.data());
  }
  // Output rows per block: what L2 may take, and few enough that every thread has blocks.
  int64_t rows = job.oh;
  while (rows > 1 && job.block_bytes(rows) > kBlockBytes) rows = ceil_div(rows, 2);
  const int64_t threads = parallel ? num_threads() : 1;
  const bool split = threads > 1 && s.n * job.oh >= threads;
  if (split) rows = std::min(rows, ceil_div(job.oh, ceil_div(threads, s.n)));
  const int64_t per_image = ceil_div(job.oh, rows);
  rows = ceil_div(job.oh, per_image);
  const int64_t blocks = ceil_div(job.oh, rows), last = job.oh - (blocks - 1) * rows;
  const Planes::Plan whole = job.plan(rows, weights), rest = last == rows ? Planes::Plan{} : job.plan(last, weights);
  maybe_parallel(split, s.n * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, y0 = i % blocks * rows, y1 = std::min(job.oh, y0 + rows);
      job.block(n, y0, y1, images[n], y1 - y0 == rows ? whole : rest, taps.data(), parallel && !split, poisoned);
    }
  });
}

}  // namespace pycompress::int8_conv2d
