// Barriers in shared memory that count arrivals and bytes of asynchronous copies (sm_90), blocks of a cluster, and registers that move
// from one warpgroup to another.
//
// A barrier has phases. One ends when all announced threads have arrived and all announced bytes are there; the next begins at once with
// the same number of threads. Phases are told apart by their parity, 0 first: waiting for parity 1 of a new barrier returns at once.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda/call_line.cuh"

namespace pycompress::cuda {

using Barrier = uint64_t;  // in shared memory, aligned to 8

#ifndef PYCOMPRESS_CUDA_EMULATION
__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

__device__ __forceinline__ void barrier_init(Barrier* barrier, unsigned arrivals) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::barrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// By the thread that initialised barriers, before a barrier of the block (or cluster) lets others, and the copy engine, at them.
__device__ __forceinline__ void barrier_init_fence() {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::barrier_init_fence();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::barrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// At the same barrier of the block of this rank in the cluster.
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, unsigned rank) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::barrier_arrive(static_cast<Barrier*>(emulation::remote_shared(barrier, rank)), 0);
#else
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// Arrives and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, unsigned bytes) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::barrier_arrive(barrier, static_cast<int>(bytes));
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}

// Until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity PYCOMPRESS_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::barrier_wait(barrier, parity, line);
#else
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// __syncthreads of the first `threads` of the block that take part; ids 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads PYCOMPRESS_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::barrier(id, static_cast<unsigned>(threads), "named barrier", line);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// All threads of all blocks of the cluster, which may also be a single block.
__device__ __forceinline__ void cluster_barrier(PYCOMPRESS_ONLY_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::cluster_barrier(line);
#else
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#endif
}

__device__ __forceinline__ unsigned cluster_rank() {
#ifdef PYCOMPRESS_CUDA_EMULATION
  return emulation::machine.current->block->rank;
#else
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// Registers per thread of this warpgroup from here on; the block keeps what the launch gave it. kCount: a multiple of 8, 24 to 256.
template <int kCount>
__device__ __forceinline__ void give_registers_back(PYCOMPRESS_ONLY_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::set_registers(kCount, line);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void take_registers(PYCOMPRESS_ONLY_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::set_registers(kCount, line);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace pycompress::cuda
