// The geometry of a convolution as Python passes it.
#pragma once
#include <array>

#include "bindings/address.h"
#include "core/unfold.h"

namespace pycompress {

// channels, padded height, padded width, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, positions in a row of the output
using Geometry = std::array<int64_t, 10>;

inline Unfold unfold(uintptr_t image, const Geometry& g) {
  return {address<const float>(image), g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9]};
}

}  // namespace pycompress
