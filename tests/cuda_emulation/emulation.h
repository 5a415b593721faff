// CUDA's execution model on the host, for tests: see README.md beside this file. This part runs threads; cuda_runtime.h gives
// them CUDA's names.
//
// Every CUDA thread is a fiber (ucontext); all run in one OS thread, one at a time, so a run is deterministic. A fiber runs until
// it must wait for others: at a barrier, or at a warp operation (shuffle, vote, matrix instruction). When nobody can go on, the
// launch fails with a description of who waits where.
#pragma once
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace emulation {

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr size_t count() const { return static_cast<size_t>(x) * y * z; }
};

// A point that `expected` threads must reach before any of them goes on.
struct Meeting {
  const char* what = nullptr;
  int line = 0;
  unsigned expected = 0, arrived = 0;
  uint64_t generation = 0;
  std::array<std::vector<unsigned char>, 2> values;  // of warp operations; the one written while the other is still read
};

struct Warp {
  std::map<unsigned, Meeting> meetings;  // by the mask of lanes
};

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Block;

using Action = std::function<void()>;

// Sums of wgmma that are not the thread's to touch now.
struct InFlight {
  std::vector<unsigned char> values;
  unsigned operations = 0;
};

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 thread{};
  unsigned linear = 0, lane = 0;
  bool done = false;
  const uint64_t* awaited = nullptr;  // waits until *awaited is no longer seen
  uint64_t seen = 0;
  const char* what = nullptr;  // it waits for
  int line = 0;
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copies;  // committed groups
  std::vector<Action> open_products;          // of wgmma
  std::deque<std::vector<Action>> products;
  std::map<void*, InFlight> in_flight;  // by the address of the sums
  bool sums_fenced = false;             // since they last were the thread's
  std::vector<uint64_t*> new_barriers;  // without a fence yet
  bool ready() const { return !awaited || *awaited != seen; }
};

struct Block {
  uint3 index{};
  unsigned rank = 0;  // in its cluster
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<int, Meeting> barriers;
  unsigned alive = 0;
  std::vector<unsigned char> shared;   // dynamic shared memory between two canaries
  std::vector<unsigned char> statics;  // contents of `__shared__` variables while another block of the cluster runs
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
};

enum class Order { forward, backward, shuffled };

struct Machine {
  dim3 grid, block, cluster;
  std::vector<Block>* blocks = nullptr;  // of the cluster that runs
  Fiber* current = nullptr;
  Block* resident = nullptr;  // whose static shared memory is in place
  Meeting cluster_barrier;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::string error;
  Order order = Order::forward;
  uint64_t seed = 1;
  std::vector<void*> stacks;
  std::vector<Action> engine;  // copies that the copy engine has not made yet
  int launches = 0;
};

inline constexpr size_t kStack = 256 * 1024, kCanary = 256;
inline constexpr unsigned char kPoison = 0xff, kCanaryByte = 0xc5;  // floats of 0xff are NaN

inline Machine machine;
inline bool driver_has_tensor_maps = true;
inline thread_local char tls_marker;  // `__shared__` is thread_local storage, whose extent the linker knows

struct Extent {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
};

// Where this library's thread_local variables are in this OS thread: all `__shared__` variables.
inline Extent static_shared() {
  Extent found;
  static_cast<volatile char&>(tls_marker) = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const auto marker = reinterpret_cast<unsigned char*>(&tls_marker);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
          if (header.p_type == PT_TLS && begin && marker >= begin && marker < begin + header.p_memsz)
            *static_cast<Extent*>(out) = {begin, static_cast<size_t>(header.p_memsz)};
        }
        return 0;
      },
      &found);
  return found;
}

inline std::string position(const Fiber& f) {
  char text[160];
  std::snprintf(text, sizeof text, "block (%u, %u, %u) thread (%u, %u, %u)", f.block->index.x, f.block->index.y, f.block->index.z,
                f.thread.x, f.thread.y, f.thread.z);
  return text;
}

inline void to_scheduler() { swapcontext(&machine.current->context, &machine.scheduler); }

// Ends the launch with a message. Does not return.
[[noreturn]] inline void fail(const std::string& message) {
  if (machine.error.empty()) machine.error = (machine.current ? position(*machine.current) + ": " : std::string()) + message;
  if (!machine.current) throw std::runtime_error(machine.error);
  to_scheduler();
  std::abort();  // the scheduler never comes back here
}

// Until `word` changes.
inline void wait(const uint64_t& word, const char* what, int line) {
  Fiber& f = *machine.current;
  f.awaited = &word, f.seen = word, f.what = what, f.line = line;
  to_scheduler();
  f.awaited = nullptr;
}
inline void wait(const Meeting& m) { wait(m.generation, m.what, m.line); }

inline void open(Meeting& m) { m.arrived = 0, m.expected = 0, ++m.generation; }

// Everybody calls the same operation at the same place, or it is an error: a divergent barrier hangs or corrupts on a device.
inline void arrive(Meeting& m, const char* what, int line, unsigned expected) {
  if (m.arrived == 0) {
    m.what = what, m.line = line, m.expected = expected;
  } else if (m.line != line || std::strcmp(m.what, what) != 0 || m.expected != expected) {
    fail(std::string("divergent ") + what + " at line " + std::to_string(line) + ": others are at " + m.what + " at line " +
         std::to_string(m.line));
  }
  ++m.arrived;
}

inline void barrier(int id, unsigned expected, const char* what, int line) {
  Block& b = *machine.current->block;
  if (expected == 0 || expected > b.fibers.size() || (expected % 32 != 0 && expected != b.fibers.size()))
    fail(std::string(what) + ": number of threads must be a multiple of 32 and at most the block's, got " + std::to_string(expected));
  Meeting& m = b.barriers[id];
  arrive(m, what, line, expected);
  if (m.arrived == expected)
    open(m);
  else
    wait(m);
}

inline void block_barrier(int line = __builtin_LINE()) {
  barrier(0, static_cast<unsigned>(machine.current->block->fibers.size()), "__syncthreads", line);
}

inline void cluster_barrier(int line = __builtin_LINE()) {
  Meeting& m = machine.cluster_barrier;
  const auto expected = static_cast<unsigned>(machine.blocks->size() * machine.current->block->fibers.size());
  arrive(m, "cluster barrier", line, expected);
  if (m.arrived == expected)
    open(m);
  else
    wait(m);
}

// Every lane of the mask hands in `value` and gets everybody's: element i is lane i's. The result stays until the lane's next
// operation with this mask. All warp operations are made of it.
inline const unsigned char* exchange(unsigned mask, const void* value, size_t bytes, const char* what, int line) {
  Fiber& f = *machine.current;
  if (!(mask >> f.lane & 1u)) fail(std::string(what) + ": lane " + std::to_string(f.lane) + " is not in its own mask");
  Meeting& m = f.warp->meetings[mask];
  arrive(m, what, line, static_cast<unsigned>(__builtin_popcount(mask)));
  auto& values = m.values[m.generation & 1];
  if (values.size() < 32 * bytes) values.resize(32 * bytes);
  std::memcpy(values.data() + f.lane * bytes, value, bytes);
  if (m.arrived == m.expected)
    open(m);
  else
    wait(m);
  return values.data();
}

template <typename T>
std::array<T, 32> gather(unsigned mask, const T& value, const char* what, int line) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::array<T, 32> all{};
  std::memcpy(all.data(), exchange(mask, &value, sizeof(T), what, line), sizeof(all));
  return all;
}

// cp.async: the copy happens as late as the instruction allows, when it is waited for, so that a missing wait shows.
inline void async_copy(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  if (reinterpret_cast<uintptr_t>(to) % (bytes + zeros) || (bytes && reinterpret_cast<uintptr_t>(from) % (bytes + zeros)))
    fail("cp.async: addresses must be aligned to the " + std::to_string(bytes + zeros) + " bytes that are copied");
  machine.current->open_copies.push_back({to, from, bytes, zeros});
}

inline void async_commit() {
  Fiber& f = *machine.current;
  f.copies.push_back(std::move(f.open_copies));
  f.open_copies.clear();
}

inline void async_wait(size_t pending) {
  Fiber& f = *machine.current;
  for (; f.copies.size() > pending; f.copies.pop_front())
    for (const AsyncCopy& c : f.copies.front()) {
      std::memcpy(c.to, c.from, c.bytes);
      std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.zeros);
    }
}

inline void* dynamic_shared() { return machine.current->block->dynamic; }

// The copy engine and wgmma know shared memory by its address within the block. It does not start at 0.
inline constexpr uint32_t kSharedBase = 1024;

inline bool in_dynamic(const Block& b, const void* p) {
  const auto* at = static_cast<const unsigned char*>(p);
  return at >= b.dynamic && at <= b.dynamic + b.dynamic_bytes;
}

// Distributed shared memory: the variable at this address in the block of this rank.
inline void* remote_shared(const void* p, unsigned rank) {
  Block& own = *machine.current->block;
  if (rank >= machine.blocks->size()) fail("map_shared_rank: the cluster has no block of rank " + std::to_string(rank));
  Block& other = (*machine.blocks)[rank];
  if (other.alive == 0) fail("map_shared_rank: the block of rank " + std::to_string(rank) + " has left");
  const auto* at = static_cast<const unsigned char*>(p);
  if (in_dynamic(own, p)) return other.dynamic + (at - own.dynamic);
  const Extent statics = static_shared();
  if (at < statics.begin || at >= statics.begin + statics.bytes) fail("map_shared_rank: the address is not in shared memory");
  return &other == &own ? const_cast<void*>(p) : other.statics.data() + (at - statics.begin);
}

inline uint32_t shared_address(const void* p) {
  const Block& b = *machine.current->block;
  if (!in_dynamic(b, p)) fail("an operand of an asynchronous instruction must be in dynamic shared memory");
  return kSharedBase + static_cast<uint32_t>(static_cast<const unsigned char*>(p) - b.dynamic);
}

// 16-byte chunks of 128 (64, 32) bytes change places by the address bits above: bits 4..6 (4..5, 4) by bits 7..9 (7..8, 7).
// `width`: 128, 64, 32, or less for no swizzle. `base`: bits 7..9 of where the pattern starts.
inline uint32_t swizzled(uint32_t address, uint32_t width, uint32_t base = 0) {
  return width < 32 ? address : address ^ ((((address >> 7) - base) & (width / 16 - 1)) << 4);
}

inline void check_canaries(Block& b) {
  const auto bad = [](const unsigned char* p) { return std::any_of(p, p + kCanary, [](unsigned char c) { return c != kCanaryByte; }); };
  if (bad(b.dynamic - kCanary) || bad(b.dynamic + b.dynamic_bytes))
    machine.error = "a write outside of dynamic shared memory (" + std::to_string(b.dynamic_bytes) + " bytes) in block (" +
                    std::to_string(b.index.x) + ", " + std::to_string(b.index.y) + ", " + std::to_string(b.index.z) + ")";
}

inline void entry() {
  machine.kernel();
  Fiber& f = *machine.current;
  if (!f.in_flight.empty()) fail("wgmma: the thread leaves the kernel without a wait for its last products");
  f.done = true;
  --f.block->alive;
  to_scheduler();
}

inline void make_resident(Block& b) {
  if (machine.resident == &b) return;
  const Extent statics = static_shared();
  if (machine.resident) std::memcpy(machine.resident->statics.data(), statics.begin, statics.bytes);
  std::memcpy(statics.begin, b.statics.data(), statics.bytes);
  machine.resident = &b;
}

inline std::string who_waits() {
  std::map<std::string, unsigned> waiting;
  unsigned left = 0;
  for (const Block& b : *machine.blocks)
    for (const Fiber& f : b.fibers) {
      if (f.done)
        ++left;
      else
        ++waiting[std::string(f.what) + " at line " + std::to_string(f.line)];
    }
  std::string text = "deadlock:";
  for (const auto& [place, count] : waiting) text += " " + std::to_string(count) + " threads wait in " + place + ",";
  return text + " " + std::to_string(left) + " threads have left the kernel";
}

inline uint64_t random() {
  machine.seed = machine.seed * 6364136223846793005u + 1442695040888963407u;
  return machine.seed >> 33;
}

// The copy engine works when nobody else can (forward), as soon as it is told to (backward; engine_action), or now and then and in any
// order (shuffled). False if there is nothing to do.
inline bool engine_works() {
  if (machine.engine.empty()) return false;
  const size_t i = machine.order == Order::shuffled ? random() % machine.engine.size() : 0;
  const Action action = std::move(machine.engine[i]);
  machine.engine.erase(machine.engine.begin() + static_cast<std::ptrdiff_t>(i));
  action();
  return true;
}

inline void engine_action(Action action) {
  if (machine.order == Order::backward)
    action();
  else
    machine.engine.push_back(std::move(action));
}

// Runs the blocks of one cluster to their end.
inline void run_cluster(std::vector<Block>& blocks) {
  machine.blocks = &blocks;
  machine.resident = nullptr;
  machine.engine.clear();
  machine.cluster_barrier = Meeting{};
  std::vector<Fiber*> fibers;
  const Extent statics = static_shared();
  size_t stack = 0;
  for (Block& b : blocks) {
    b.statics.assign(statics.bytes, kPoison);
    b.barriers.clear();
    b.warps.assign((machine.block.count() + 31) / 32, Warp{});
    b.fibers = std::vector<Fiber>(machine.block.count());
    b.alive = static_cast<unsigned>(b.fibers.size());
    for (unsigned i = 0; i < b.fibers.size(); ++i, ++stack) {
      Fiber& f = b.fibers[i];
      f.block = &b, f.warp = &b.warps[i / 32], f.linear = i, f.lane = i % 32;
      f.thread = {i % machine.block.x, i / machine.block.x % machine.block.y, i / machine.block.x / machine.block.y};
      if (stack == machine.stacks.size()) {
        void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for the stacks of threads");
        machine.stacks.push_back(memory);
      }
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = machine.stacks[stack];
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
      fibers.push_back(&f);
    }
  }
  if (machine.order == Order::backward) std::reverse(fibers.begin(), fibers.end());
  size_t alive = fibers.size();
  while (alive && machine.error.empty()) {
    if (machine.order == Order::shuffled)
      for (size_t i = fibers.size(); i > 1; --i) std::swap(fibers[i - 1], fibers[random() % i]);
    bool progress = machine.order == Order::shuffled && random() % 4 == 0 && engine_works();
    for (Fiber* f : fibers) {
      if (f->done || !f->ready()) continue;
      progress = true;
      make_resident(*f->block);
      machine.current = f;
      swapcontext(&machine.scheduler, &f->context);
      machine.current = nullptr;
      if (f->done) --alive;
      if (!machine.error.empty()) return;
    }
    if (!progress && !engine_works()) machine.error = who_waits();
  }
  if (machine.error.empty() && !machine.engine.empty())
    machine.error = "copies are on their way into shared memory when its last thread leaves";
  for (Block& b : blocks) check_canaries(b);
}

// Keeps the thread_local variables that are no `__shared__` (pybind11 has some) out of a launch.
class Bystanders {
 public:
  Bystanders() : extent_(static_shared()), saved_(extent_.begin, extent_.begin + extent_.bytes) {}
  ~Bystanders() { std::memcpy(extent_.begin, saved_.data(), extent_.bytes); }

 private:
  Extent extent_;
  std::vector<unsigned char> saved_;
};

// Runs a grid. Throws std::runtime_error for what would hang or corrupt on a device.
inline void run(dim3 grid, dim3 block, dim3 cluster, size_t dynamic_bytes, std::function<void()> kernel) {
  if (machine.current) throw std::runtime_error("emulation: a kernel cannot launch a kernel");
  machine.grid = grid, machine.block = block, machine.cluster = cluster;
  machine.kernel = std::move(kernel);
  machine.error.clear();
  ++machine.launches;
  const Bystanders bystanders;
  std::vector<Block> blocks(cluster.count());
  for (unsigned z = 0; z < grid.z; z += cluster.z)
    for (unsigned y = 0; y < grid.y; y += cluster.y)
      for (unsigned x = 0; x < grid.x; x += cluster.x) {
        for (unsigned r = 0; r < blocks.size(); ++r) {
          Block& b = blocks[r];
          b.rank = r;
          b.index = {x + r % cluster.x, y + r / cluster.x % cluster.y, z + r / cluster.x / cluster.y};
          b.dynamic_bytes = dynamic_bytes;
          b.shared.assign(dynamic_bytes + 2 * kCanary + 1024, kCanaryByte);
          const auto base = (reinterpret_cast<uintptr_t>(b.shared.data()) + kCanary + 1023) / 1024 * 1024;
          b.dynamic = reinterpret_cast<unsigned char*>(base);
          std::memset(b.dynamic, kPoison, dynamic_bytes);
        }
        run_cluster(blocks);
        machine.current = nullptr;
        if (!machine.error.empty()) {
          machine.kernel = nullptr;
          throw std::runtime_error("emulated kernel: " + machine.error);
        }
      }
  machine.kernel = nullptr;
}

}  // namespace emulation

// For tests: 0 forward, 1 backward, otherwise shuffled with this seed. A race that one order hides shows in another.
extern "C" __attribute__((visibility("default"), used)) inline void emulation_set_order(uint64_t order) {
  using namespace emulation;
  machine.order = order == 0 ? Order::forward : order == 1 ? Order::backward : Order::shuffled;
  machine.seed = order;
}

// For tests: whether the driver can make tensor maps (cuda.h).
extern "C" __attribute__((visibility("default"), used)) inline void emulation_set_tensor_maps(int has) {
  emulation::driver_has_tensor_maps = has != 0;
}
