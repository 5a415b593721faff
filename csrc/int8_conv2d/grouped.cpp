// Groups of few channels on pixels: as many groups as fill a vector of output channels, each lane fed from its own group.
//
// The GEMM view multiplies every input of merged groups with every output, zeros for the most part (4 groups of 4 channels: 3 of 4). Here
// a shuffle gives each output channel the dword of its own group, so that nothing but what is wanted is multiplied.
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/scratch.h"
#include "int8_conv2d/layout.h"
#include "int8_conv2d/pixels.h"

namespace pycompress::int8_conv2d {
namespace {

constexpr int64_t kBandBytes = 128 * 1024;
constexpr int64_t kLanes = 16;

struct Grouped {
  const Kernel& kernel;
  const Args& a;
  const Shape& s;
  const Gemm& gemm;
  Layout layout;
  Sink sink;
  int64_t oh, ow, quads;  // quads: dwords of one group of a pixel

  Grouped(const Kernel& kernel_, const Args& args)
      : kernel(kernel_),
        a(args),
        s(args.shape),
        gemm(*kernel_.gemm),
        layout(*kernel_.gemm, args.shape),
        sink(kernel_, args),
        oh(args.shape.out_h()),
        ow(args.shape.out_w()),
        quads(args.shape.c / args.shape.groups / kernel_.gemm->kr) {}

  int64_t steps() const { return s.taps() * quads; }
  int64_t cols() const { return (ow - 1) * s.stride_w + (s.kw - 1) * s.dilation_w + 1; }
  int64_t in_rows(int64_t rows) const { return (rows - 1) * s.stride_h + (s.kh - 1) * s.dilation_h + 1; }
  int64_t pixel_bytes() const { return s.c * gemm.a_size; }
  int64_t row_bytes() const { return Band::row_bytes(cols(), pixel_bytes()); }

  // Dwords [set][step][lane] out of the packed ones, and which dword of a pixel each lane takes at each of `quads` steps.
  void weights(int32_t* w, int32_t* index) const {
    std::memset(w, 0, static_cast<size_t>(layout.sets * steps() * kLanes) * 4);
    std::memset(index, 0, static_cast<size_t>(quads * kLanes) * 4);
    const int64_t group_cols = s.o / s.groups;
    for (int64_t col = 0; col < layout.cols; ++col)
      for (int64_t i = 0; i < quads; ++i) index[i * kLanes + col] = static_cast<int32_t>(col / group_cols * quads + i);
    for (int64_t set = 0; set < layout.sets; ++set) {
      const char* packed = static_cast<const char*>(a.packed) + set * layout.set_bytes;
      for (int64_t t = 0; t < s.taps(); ++t)
        for (int64_t i = 0; i < quads; ++i)
          for (int64_t col = 0; col < layout.cols; ++col) {
            const int64_t k = layout.position(s, t, (col / group_cols * quads + i) * gemm.kr);
            const char* from = packed + (k / gemm.kr * gemm.nv + col) * gemm.kr;
            int32_t* to = w + ((set * s.taps() + t) * quads + i) * kLanes + col;
            const int16_t wide[2] = {static_cast<signed char>(from[0]), static_cast<signed char>(from[1])};
            std::memcpy(to, gemm.a_size == 2 ? static_cast<const void*>(wide) : from, 4);
          }
    }
  }

  // Output rows [y0, y1) of image n.
  void block(int64_t n, int64_t y0, int64_t y1, const Image& image, const int32_t* w, const int32_t* index, bool parallel,
             std::atomic<bool>* poisoned) const {
    static thread_local Scratch band_memory;
    const int64_t row = row_bytes(), rows = in_rows(y1 - y0);
    char* data = static_cast<char*>(band_memory.get(static_cast<size_t>(rows * row)));
    fill_band(kernel, a, n, image, parallel, {data, row, pixel_bytes(), y0 * s.stride_h - s.pad_h, -s.pad_w, rows, cols()}, poisoned);
    std::vector<int64_t> taps;
    for (int64_t t = 0; t < s.taps(); ++t) taps.push_back(t / s.kw * s.dilation_h * row + t % s.kw * s.dilation_w * pixel_bytes());
    const int32_t correction = gemm.correction(a.dynamic ? 0 : a.x_zero_point);
    maybe_parallel(parallel, layout.sets, [&](int64_t begin, int64_t end) {
      static thread_local Scratch strip_memory;
      float* strip = sink.is_plain() ? nullptr : strip_memory.get<float>(static_cast<size_t>(round_up(ow, 16) * kLanes));
      for (int64_t set = begin; set < end; ++set) {
        const int64_t col = set * layout.cols;
        int32_t offsets[kLanes] = {};
        for (int64_t i = 0; i < layout.cols; ++i)
          offsets[i] = static_cast<int32_t>(static_cast<uint32_t>(weight_sums(a, layout)[col + i]) * static_cast<uint32_t>(correction));
        GroupedPixels p{data + set * layout.channels * gemm.a_size,
                        s.stride_w * pixel_bytes(),
                        taps.data(),
                        s.taps(),
                        quads,
                        index,
                        w + set * steps() * kLanes,
                        offsets,
                        image.scale,
                        a.scale + col,
                        a.bias ? a.bias + col : nullptr,
                        sink.inner,
                        ow,
                        layout.cols,
                        strip,
                        strip ? kLanes : s.o};
        for (int64_t y = y0; y < y1; ++y, p.x += s.stride_h * row) {
          if (!strip) p.out = sink.plain(n, y * ow, col);
          kernel.pixels->grouped(p);
          if (strip) sink.store(n, y * ow, ow, col, layout.cols, strip, kLanes);
        }
      }
    });
  }
};

}  // namespace

bool grouped_applies(const Kernel& kernel, const Args& a) {
  const Shape& s = a.shape;
  if (!kernel.pixels || s.groups == 1 || is_depthwise(s) || s.c / s.groups % kernel.gemm->kr) return false;
  const Layout layout(*kernel.gemm, s);
  return layout.cols <= kLanes && layout.channels <= (kernel.gemm->a_size == 2 ? 16 : 64);  // what one shuffle of dwords reaches
}

// Worth it where merged groups would multiply zeros.
bool grouped_pays(const Kernel& kernel, const Args& a) { return Layout(*kernel.gemm, a.shape).merged > 1; }

void grouped(const Kernel& kernel, const Args& a, const Image* images, bool parallel, std::atomic<bool>* poisoned) {
  const Grouped job(kernel, a);
  const Shape& s = a.shape;
  static thread_local Scratch weight_memory;
  int32_t* w = weight_memory.get<int32_t>(static_cast<size_t>((job.layout.sets * job.steps() + job.quads) * kLanes));
  int32_t* index = w + job.layout.sets * job.steps() * kLanes;
  job.weights(w, index);
  int64_t rows = std::clamp<int64_t>((kBandBytes / job.row_bytes() - job.in_rows(1)) / s.stride_h + 1, 1, job.oh);
  const int64_t threads = parallel ? num_threads() : 1;
  const bool split = threads > 1 && s.n * job.oh >= threads;
  if (split) rows = std::min(rows, ceil_div(job.oh, ceil_div(threads, s.n)));
  const int64_t per_image = ceil_div(job.oh, rows);
  rows = ceil_div(job.oh, per_image);
  maybe_parallel(split, s.n * per_image, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / per_image, y0 = i % per_image * rows, y1 = std::min(job.oh, y0 + rows);
      if (y0 < y1) job.block(n, y0, y1, images[n], w, index, parallel && !split, poisoned);
    }
  });
}

}  // namespace pycompress::int8_conv2d
