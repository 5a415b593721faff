// Of cooperative groups, the cluster.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  static void sync(int line = __builtin_LINE()) { emulation::cluster_barrier(line); }
  static unsigned block_rank() { return emulation::machine.current->block->rank; }
  static unsigned num_blocks() { return static_cast<unsigned>(emulation::machine.blocks->size()); }
  template <typename T>
  static T* map_shared_rank(T* p, unsigned rank) {
    return static_cast<T*>(emulation::remote_shared(p, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
