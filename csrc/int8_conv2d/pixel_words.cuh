// How the words of q (four channels of a pixel) are shared among blocks, and which channels of x they hold.
#pragma once
#include "core/cuda/divide.cuh"
#include "int8_conv2d/int8_conv2d_cuda.h"

namespace pycompress::int8_conv2d {

struct PixelWords {
  static constexpr int kItems = 4;            // words per thread
  static constexpr int kTileWidth = 16;       // words of a tile between x (NCHW) and q
  static constexpr int kTileWords = 256 * 5;  // for 64 pixels x 17 words or 256 x 5

  int per_pixel, per_image, per_set, channels;
  cuda::Divider per_pixel_divider, per_set_divider;
  int tile_pixels, tile_step, tiles;  // NCHW: pixels of a tile, words from one to the next (odd: no bank conflicts), tiles side by side
  int64_t blocks;                     // per image

  PixelWords(const QuantizeImagesArgs& args, int threads)
      : per_pixel(static_cast<int>(args.sets * args.padded / 4)),
        per_image(static_cast<int>(args.pixels) * per_pixel),
        per_set(static_cast<int>(args.padded / 4)),
        channels(static_cast<int>(args.channels)),
        per_pixel_divider(per_pixel),
        per_set_divider(per_set) {
    const bool narrow = per_pixel <= 4;  // an image of few channels: more pixels instead
    tile_pixels = narrow ? 256 : 64;
    tile_step = narrow ? 5 : kTileWidth + 1;
    tiles = static_cast<int>(ceil_div(per_pixel, kTileWidth));
    blocks = args.channels_last ? ceil_div(per_image, kItems * threads) : ceil_div(args.pixels, tile_pixels) * tiles;
  }

  // The first channel of x in a word of a pixel, and how many there are.
  __device__ __forceinline__ int source(int word, int& channel) const {
    int in_set;
    const int set = per_set_divider.divide(word, in_set);
    channel = set * channels + in_set * 4;
    const int left = channels - in_set * 4;
    return left < 0 ? 0 : left > 4 ? 4 : left;
  }
};

}  // namespace pycompress::int8_conv2d
