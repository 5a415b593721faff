// Images of floats (or int8 in another layout) to q, pixels of int8 channels: the arithmetic of pycompress/ops/affine.py.
//
// Dynamic scales take two launches: the largest |x| of every image in parts, then the rounding, which finds it among the parts.
#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "int8_conv2d/int8_conv2d_cuda.h"
#include "int8_conv2d/pixel_words.cuh"

namespace pycompress::int8_conv2d {
namespace {

using namespace pycompress::cuda;

constexpr int kThreads = 256;
constexpr const char* kWhat = "int8_conv2d (quantization of images)";

// The largest value of the block; every thread gets it. `scratch` as in block_reduce.
__device__ __forceinline__ uint32_t block_max(uint32_t value, uint32_t* scratch) {
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) value = scratch[i] > value ? scratch[i] : value;
  __syncthreads();
  return value;
}

// partial[image][part] = largest |x| of that part as bits, which order as integers do: Inf and NaN above everything.
template <class T>
__global__ void __launch_bounds__(kThreads) largest_of_images(const __grid_constant__ QuantizeImagesArgs p, bool aligned) {
  __shared__ uint32_t scratch[kThreads / 32];
  const int64_t image = blockIdx.x / p.partials, part = blockIdx.x % p.partials, size = p.c * p.pixels;
  const T* const x = static_cast<const T*>(p.x) + image * p.image_stride;
  const auto bits = [](T v) { return __float_as_uint(to_float(v)) & 0x7fffffffu; };
  uint32_t largest = 0;
  const int64_t chunks = aligned ? size / 8 : 0;
  for (int64_t i = part * kThreads + static_cast<int>(threadIdx.x); i < chunks; i += p.partials * kThreads) {
    const Eight<T> chunk = load8(x + i * 8);
#pragma unroll
    for (int k = 0; k < 8; ++k) largest = max(largest, bits(chunk.v[k]));
  }
  for (int64_t i = chunks * 8 + part * kThreads + static_cast<int>(threadIdx.x); i < size; i += p.partials * kThreads)
    largest = max(largest, bits(x[i]));
  largest = block_max(largest, scratch);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = largest;
}

// 1 / scale of an image; notes the scale (or, if static, nothing yet).
__device__ __forceinline__ float image_inverse(const QuantizeImagesArgs& p, int64_t image, bool first, uint32_t* scratch) {
  if (!p.dynamic) return 1.0f / p.x_scale;
  constexpr float kSmallestAmax = 0x1p-100f;
  const int thread = static_cast<int>(threadIdx.x);
  static_assert(kMaxPartials <= kThreads);
  const uint32_t largest = block_max(thread < p.partials ? p.partial[image * p.partials + thread] : 0, scratch);
  const float amax = __uint_as_float(largest), scale = amax < kSmallestAmax ? 0.0f : amax / 127.0f;
  const bool finite = largest < 0x7f800000u;
  if (first && thread == 0) p.image_scale[image] = finite ? scale : __int_as_float(0x7fc00000);
  return finite && scale > 0.0f ? 1.0f / scale : 0.0f;
}

// A block takes kItems * kThreads words (four channels of a pixel in q) of an image.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    quantize_images(const __grid_constant__ QuantizeImagesArgs p, const __grid_constant__ PixelWords words, bool aligned) {
  __shared__ uint32_t scratch[kThreads / 32];
  __shared__ uint32_t tile[kChannelsLast ? 1 : PixelWords::kTileWords];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t image = blockIdx.x / words.blocks;
  const int block = static_cast<int>(blockIdx.x % words.blocks);
  const T* const x = static_cast<const T*>(p.x) + image * p.image_stride;
  uint32_t* const q = reinterpret_cast<uint32_t*>(p.q) + image * p.pixels * words.per_pixel;
  constexpr bool kFloat = !std::is_same_v<T, int8_t>;
  float inverse = 0.0f;
  if constexpr (kFloat) inverse = image_inverse(p, image, block == 0, scratch);
  const float smallest = static_cast<float>(p.quant_min - p.x_zero_point), largest = static_cast<float>(127 - p.x_zero_point);

  bool finite = true;
  const auto pack = [&](const Four<T>& values, int count) {
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int value;
      if constexpr (kFloat) {
        const float f = to_float(values.v[i]);
        finite = finite && (__float_as_uint(f) & 0x7fffffffu) < 0x7f800000u;
        value = static_cast<int>(fminf(fmaxf(rintf(f * inverse), smallest), largest)) + p.x_zero_point;
      } else {
        value = values.v[i];
      }
      if (i < count) packed |= (static_cast<uint32_t>(value) & 0xffu) << (8 * i);
    }
    return packed;
  };

  if constexpr (kChannelsLast) {
#pragma unroll
    for (int i = 0; i < PixelWords::kItems; ++i) {
      const int item = (block * PixelWords::kItems + i) * kThreads + thread;
      if (item >= words.per_image) break;
      int word, channel;
      const int64_t pixel = words.per_pixel_divider.divide(item, word);
      const int count = words.source(word, channel);
      const T* const from = x + pixel * p.c + channel;
      Four<T> v;
      if (aligned && count == 4) {
        v = load4(from);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) v.v[k] = k < count ? from[k] : T{};
      }
      q[item] = pack(v, count);
    }
  } else {
    // Neighbouring threads read neighbouring pixels and write neighbouring channels; the tile lies between.
    const int first_pixel = block / words.tiles * words.tile_pixels, first_word = block % words.tiles * PixelWords::kTileWidth;
    const int width = words.per_pixel - first_word < PixelWords::kTileWidth ? words.per_pixel - first_word : PixelWords::kTileWidth;
    const int height =
        static_cast<int>(p.pixels) - first_pixel < words.tile_pixels ? static_cast<int>(p.pixels) - first_pixel : words.tile_pixels;
#pragma unroll
    for (int i = 0; i < PixelWords::kItems; ++i) {
      const int item = i * kThreads + thread, pixel = item % words.tile_pixels, word = item / words.tile_pixels;
      if (pixel >= height || word >= width) continue;
      int channel;
      const int count = words.source(first_word + word, channel);
      const T* const from = x + channel * p.pixels + first_pixel + pixel;
      Four<T> v;
#pragma unroll
      for (int k = 0; k < 4; ++k) v.v[k] = k < count ? from[k * p.pixels] : T{};
      tile[pixel * words.tile_step + word] = pack(v, count);
    }
    __syncthreads();
    for (int item = thread; item < height * width; item += kThreads) {
      const int pixel = item / width, word = item % width;
      q[static_cast<int64_t>(first_pixel + pixel) * words.per_pixel + first_word + word] = tile[pixel * words.tile_step + word];
    }
  }
  // Many may write, all the same. A dynamic image has been found to be finite or not before.
  if constexpr (kFloat)
    if (!finite && !p.dynamic) p.image_scale[image] = __int_as_float(0x7fc00000);
}

template <class T>
void run(const QuantizeImagesArgs& args, const Stream& stream) {
  const auto aligned_to = [&](int64_t bytes) {
    return reinterpret_cast<uintptr_t>(args.x) % static_cast<uintptr_t>(bytes) == 0 &&
           args.image_stride * static_cast<int64_t>(sizeof(T)) % bytes == 0;
  };
  if constexpr (!std::is_same_v<T, int8_t>) {
    if (args.dynamic) {
      const Grid grid{dim3(static_cast<unsigned>(args.n * args.partials)), kThreads};
      launch(kWhat, grid, stream.stream, largest_of_images<T>, args, aligned_to(16));
    } else {
      check(cudaMemsetAsync(args.image_scale, 0, static_cast<size_t>(args.n) * sizeof(float), static_cast<cudaStream_t>(stream.stream)),
            kWhat);
    }
  }
  const PixelWords words(args, kThreads);
  const Grid grid{dim3(static_cast<unsigned>(args.n * words.blocks)), kThreads};
  if (args.channels_last) {
    const bool aligned = aligned_to(4 * sizeof(T)) && args.c % 4 == 0 && args.channels % 4 == 0;
    launch(kWhat, grid, stream.stream, quantize_images<T, true>, args, words, aligned);
  } else if constexpr (!std::is_same_v<T, int8_t>) {
    launch(kWhat, grid, stream.stream, quantize_images<T, false>, args, words, false);
  } else {
    throw std::invalid_argument("int8_conv2d: an int8 x must be channels_last");
  }
}

}  // namespace

void quantize_images_cuda(const QuantizeImagesArgs& args, const Stream& stream) {
  const DeviceGuard guard(stream.device, kWhat);
  switch (args.x_type) {
    case Element::f32:
      return run<float>(args, stream);
    case Element::bf16:
      return run<__nv_bfloat16>(args, stream);
    case Element::f16:
      return run<__half>(args, stream);
    case Element::i8:
      return run<int8_t>(args, stream);
  }
}

}  // namespace pycompress::int8_conv2d
