// mbarrier: the 64-bit object in shared memory, its arrivals and bytes, and the wait for a phase. (PTX ISA, "Parallel Synchronization and
// Communication Instructions: mbarrier".) Our own bits, but as many of each as the hardware has:
//
//   0..20 bytes that are announced and not there (two's complement)   21..40 threads that still arrive   41..60 threads of a phase
//   61 parity of the phase                                            62..63 1: initialised, 2: and fenced
//
// Memory that is no barrier, as poisoned shared memory, is told from one by the last.
#pragma once
#include "emulation.h"

namespace emulation {

struct BarrierState {
  int64_t bytes;
  uint64_t pending, threads, parity, state;
};

inline BarrierState load_barrier(const uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) fail("mbarrier: must be aligned to 8 bytes");
  const uint64_t w = *barrier;
  const BarrierState s{static_cast<int64_t>(w << 43) >> 43, w >> 21 & 0xfffff, w >> 41 & 0xfffff, w >> 61 & 1, w >> 62};
  if (s.state != 1 && s.state != 2) fail("mbarrier: used before it was initialised, or overwritten");
  return s;
}

// Ends the phase when everything is there.
inline void store_barrier(uint64_t* barrier, BarrierState s) {
  if (s.pending == 0 && s.bytes == 0) s.pending = s.threads, s.parity ^= 1;
  *barrier = (static_cast<uint64_t>(s.bytes) & 0x1fffff) | s.pending << 21 | s.threads << 41 | s.parity << 61 | s.state << 62;
}

inline void barrier_init(uint64_t* barrier, unsigned threads) {
  (void)shared_address(barrier);
  if (reinterpret_cast<uintptr_t>(barrier) % 8) fail("mbarrier: must be aligned to 8 bytes");
  if (threads == 0 || threads > 0xfffff) fail("mbarrier: number of threads must be 1 to 2^20 - 1");
  store_barrier(barrier, {0, threads, threads, 0, 1});
  machine.current->new_barriers.push_back(barrier);
}

inline void barrier_init_fence() {
  for (uint64_t* barrier : machine.current->new_barriers) {
    BarrierState s = load_barrier(barrier);
    s.state = 2;
    store_barrier(barrier, s);
  }
  machine.current->new_barriers.clear();
}

inline void barrier_arrive(uint64_t* barrier, int bytes) {
  BarrierState s = load_barrier(barrier);
  if (s.pending == 0) fail("mbarrier: more threads arrive than it was initialised for");
  --s.pending, s.bytes += bytes;
  if (s.bytes >= 1 << 20) fail("mbarrier: more than 2^20 - 1 bytes");
  store_barrier(barrier, s);
}

// What the copy engine does when bytes have arrived; they may be early, before they were announced.
inline void barrier_bytes(uint64_t* barrier, size_t bytes) {
  BarrierState s = load_barrier(barrier);
  if (s.state != 2) fail("mbarrier: a copy ends at a barrier whose initialisation was not followed by fence.mbarrier_init");
  s.bytes -= static_cast<int64_t>(bytes);
  if (s.bytes <= -(1 << 20)) fail("mbarrier: more than 2^20 - 1 bytes that nobody announced");
  store_barrier(barrier, s);
}

inline void barrier_wait(uint64_t* barrier, unsigned parity, int line) {
  if (parity > 1) fail("mbarrier: parity must be 0 or 1");
  (void)shared_address(barrier);  // of the own block
  while (load_barrier(barrier).parity == parity) wait(*barrier, "mbarrier", line);
}

}  // namespace emulation
