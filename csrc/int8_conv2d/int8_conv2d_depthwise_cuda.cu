// Depthwise convolution: one channel per group, nothing for the tensor cores. A thread computes four channels (a word of q) of four
// neighbouring output pixels of a row. Words of four pixels are transposed to words of four pixels of one channel each, which dp4a
// multiplies by four taps of a kernel row: eight permutations and four dp4a for sixteen products.
//
// For the usual widths and strides each word of a row is loaded once for all four outputs, and with stride 1 a transposed word serves two
// of them: with the taps as they are for the left one, and moved by one byte for the right one.
#include "core/cuda/launch.cuh"
#include "int8_conv2d/int8_conv2d_epilogue.cuh"
#include "int8_conv2d/output_pixels.cuh"

namespace pycompress::int8_conv2d {
namespace {

using namespace pycompress::cuda;

constexpr int kWordLanes = 8, kRunLanes = 32, kThreads = kWordLanes * kRunLanes;  // 32 channels side by side fill a sector of memory
constexpr int kPixels = 4;                                                        // of a thread: a run

struct Depthwise {
  const uint4* weight;
  OutputPixels pixels;
  int kernel_h, fours, words, channels, word_blocks, runs, out_w;  // fours: of taps in a kernel row
  uint32_t padding;                                                // four zero points
  Divider runs_in_row, out_h;

  explicit Depthwise(const ConvArgs& a)
      : weight(reinterpret_cast<const uint4*>(a.weight)),
        pixels(a),
        kernel_h(static_cast<int>(a.shape.kh)),
        fours(static_cast<int>(ceil_div(a.shape.kw, 4))),
        words(static_cast<int>(a.padded / 4)),
        channels(static_cast<int>(a.shape.o)),
        word_blocks(static_cast<int>(ceil_div(words, kWordLanes))),
        runs(static_cast<int>(a.shape.n * a.out_h * ceil_div(a.out_w, kPixels))),
        out_w(static_cast<int>(a.out_w)),
        padding((static_cast<uint32_t>(a.output.zero_point) & 0xffu) * 0x01010101u),
        runs_in_row(ceil_div(a.out_w, kPixels)),
        out_h(a.out_h) {}
};

// Byte i of out[j] is byte j of in[i].
__device__ __forceinline__ void transpose4x4(uint32_t (&out)[4], uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t low_first = __byte_perm(a, b, 0x5140), high_first = __byte_perm(a, b, 0x7362);
  const uint32_t low_second = __byte_perm(c, d, 0x5140), high_second = __byte_perm(c, d, 0x7362);
  out[0] = __byte_perm(low_first, low_second, 0x5410);
  out[1] = __byte_perm(low_first, low_second, 0x7632);
  out[2] = __byte_perm(high_first, high_second, 0x5410);
  out[3] = __byte_perm(high_first, high_second, 0x7632);
}

struct Taps {
  uint32_t of[4];  // of each channel four
};

__device__ __forceinline__ void multiply(int32_t (&sums)[4], const uint32_t (&in)[4], const Taps& taps) {
#pragma unroll
  for (int c = 0; c < 4; ++c) sums[c] = __dp4a(static_cast<int>(in[c]), static_cast<int>(taps.of[c]), sums[c]);
}

// Adds one row of the kernel. `row`: this word's channels at the first tap of the first pixel of the run, x0; the columns below w exist
// (w = 0: none, the row is padding).
template <int kWidth, int kStride>
__device__ __forceinline__ void add_row(int32_t (&sums)[kPixels][4], const Depthwise& p, const uint4* weight, const int8_t* row, int x0,
                                        unsigned w) {
  const auto load_taps = [&](int four) {
    const uint4 taps = __ldg(weight + static_cast<int64_t>(four) * p.words);
    return Taps{{taps.x, taps.y, taps.z, taps.w}};
  };
  const auto load = [&](int step) {
    return static_cast<unsigned>(x0 + step) < w
               ? __ldg(reinterpret_cast<const uint32_t*>(row + step * static_cast<int64_t>(p.pixels.pixel_stride)))
               : p.padding;
  };
  uint32_t by_channel[4];
  if constexpr (kWidth == 0) {  // any width, stride and dilation
    for (int four = 0; four < p.fours; ++four) {
      const Taps taps = load_taps(four);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const int first = i * p.pixels.stride_w + four * 4 * p.pixels.dilation_w, step = p.pixels.dilation_w;
        transpose4x4(by_channel, load(first), load(first + step), load(first + 2 * step), load(first + 3 * step));
        multiply(sums[i], by_channel, taps);
      }
    }
  } else {
    constexpr int kFours = (kWidth + 3) / 4, kColumns = (kPixels - 1) * kStride + kWidth;
    static_assert(kWidth % 4 != 0, "the taps of the right pixel need one place more");
    uint32_t in[kColumns + 4];
#pragma unroll
    for (int x = 0; x < kColumns; ++x) in[x] = load(x);
#pragma unroll
    for (int x = kColumns; x < kColumns + 4; ++x) in[x] = 0;  // the taps there are zero
    Taps left[kFours], right[kFours];
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      left[f] = load_taps(f);
#pragma unroll
      for (int c = 0; c < 4; ++c) right[f].of[c] = __byte_perm(f == 0 ? 0u : left[f - 1 < 0 ? 0 : f - 1].of[c], left[f].of[c], 0x6543);
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (kStride == 1 && i % 2 == 1) continue;
#pragma unroll
      for (int f = 0; f < kFours; ++f) {
        const int x = i * kStride + 4 * f;
        transpose4x4(by_channel, in[x], in[x + 1], in[x + 2], in[x + 3]);
        multiply(sums[i], by_channel, left[f]);
        if constexpr (kStride == 1) multiply(sums[i + 1], by_channel, right[f]);
      }
    }
  }
}

template <class Out, int kWidth, int kStride>
__global__ void __launch_bounds__(kThreads)
    int8_conv2d_depthwise(const __grid_constant__ Depthwise p, const __grid_constant__ Output output, bool pixels_together) {
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int word = block % p.word_blocks * kWordLanes + thread % kWordLanes;
  const int run = block / p.word_blocks * kRunLanes + thread / kWordLanes;
  if (word >= p.words || run >= p.runs) return;
  int in_row, out_y;
  const int image = p.out_h.divide(p.runs_in_row.divide(run, in_row), out_y);
  const int out_x = in_row * kPixels, pixels = min(p.out_w - out_x, kPixels);
  const int y0 = out_y * p.pixels.stride_h - p.pixels.pad_h, x0 = out_x * p.pixels.stride_w - p.pixels.pad_w;

  int32_t sums[kPixels][4] = {};
  for (int ky = 0; ky < p.kernel_h; ++ky) {
    const int y = y0 + ky * p.pixels.dilation_h;
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(p.pixels.h);
    if (!inside && p.padding == 0) continue;
    // The address is only read where x is inside.
    const int64_t place = static_cast<int64_t>(y) * p.pixels.row_stride + static_cast<int64_t>(x0) * p.pixels.pixel_stride + word * 4;
    add_row<kWidth, kStride>(sums, p, p.weight + static_cast<int64_t>(ky * p.fours) * p.words + word, p.pixels.image(image) + place, x0,
                             inside ? static_cast<unsigned>(p.pixels.w) : 0u);
  }

  Channel channels[4];
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (word * 4 + c < p.channels) channels[c].load(output.args, word * 4 + c);
  Out* const out = static_cast<Out*>(output.args.out);
  const int64_t stride = output.channel_stride(), first_pixel = static_cast<int64_t>(out_y) * p.out_w + out_x;
  const float image_scale = output.image_scale(image);
  const bool channels_together = output.aligned && output.args.channels_last;
  Out values[kPixels][4];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    if (i >= pixels) continue;
    const int64_t index = output.index(image, first_pixel + i, word * 4);
    float y[4], residual[4] = {};
    if (output.args.residual) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (word * 4 + c < p.channels) residual[c] = residual_at(output.args, index + c * stride);
    }
    finish(y, sums[i], image_scale, channels, residual, output.args);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      values[i][c] = to_output<Out>(y[c], output);
      if (!channels_together && !pixels_together && word * 4 + c < p.channels) out[index + c * stride] = values[i][c];
    }
    if (channels_together) store4(out + index, Four<Out>{values[i][0], values[i][1], values[i][2], values[i][3]});
  }
  if (!pixels_together) return;
  const int64_t index = output.index(image, first_pixel, word * 4);
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (word * 4 + c < p.channels) store4(out + index + c * stride, Four<Out>{values[0][c], values[1][c], values[2][c], values[3][c]});
}

template <int kWidth, int kStride>
void run_depthwise(const ConvArgs& args, const Stream& stream) {
  constexpr const char* kWhat = "int8_conv2d (depthwise)";
  const DeviceGuard guard(stream.device, kWhat);
  const Depthwise depthwise(args);
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(depthwise.runs, kRunLanes) * depthwise.word_blocks)), kThreads};
  with_out_type(args.output.out_type, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    const Output output(args, depthwise.channels);
    // NCHW, and a run is aligned.
    const bool pixels_together =
        !args.output.channels_last && args.out_w % kPixels == 0 && reinterpret_cast<uintptr_t>(args.output.out) % 16 == 0;
    launch(kWhat, grid, stream.stream, int8_conv2d_depthwise<Out, kWidth, kStride>, depthwise, output, pixels_together);
  });
}

}  // namespace

void conv_cuda_depthwise(const ConvArgs& args, const Stream& stream) {
  const bool usual = args.shape.dilation_w == 1 && args.shape.stride_w <= 2;
  const bool dense = args.shape.stride_w == 1;
  if (usual && args.shape.kw == 3) return dense ? run_depthwise<3, 1>(args, stream) : run_depthwise<3, 2>(args, stream);
  if (usual && args.shape.kw == 5) return dense ? run_depthwise<5, 1>(args, stream) : run_depthwise<5, 2>(args, stream);
  if (usual && args.shape.kw == 7) return dense ? run_depthwise<7, 1>(args, stream) : run_depthwise<7, 2>(args, stream);
  run_depthwise<0, 0>(args, stream);
}

}  // namespace pycompress::int8_conv2d
