// How a block that stays goes through tiles and stages, for kernels with a producer and consumers.
#pragma once
#include <cuda_runtime.h>

namespace pycompress::cuda {

// A tile of a matrix whose rows are cut among clusters, its columns into tiles.
struct TilePlace {
  int cluster, tile;
};

// In groups of `period` clusters, along the rows first: neighbours in time share their columns' operand in the L2 cache, and their rows'.
__device__ __forceinline__ TilePlace tile_place(int index, int clusters, int tiles, int period) {
  const int in_group = period * tiles, group = index / in_group, rest = index % in_group;
  const int height = clusters - group * period < period ? clusters - group * period : period;
  return {group * period + rest % height, rest / height};
}

// Stage and parity, in turn.
template <int kStages>
struct Turn {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void skip(int steps) {
    stage += steps;
    parity ^= static_cast<unsigned>(stage / kStages) & 1, stage %= kStages;
  }
};

}  // namespace pycompress::cuda
