// Kernels for the tests of the emulator's copy engine, mbarrier and wgmma: right ones, and ones that would hang or corrupt on a device.
#include <string>

#include "core/cuda/tensor_map.cuh"
#include "core/cuda/wgmma.cuh"

namespace {

using namespace pycompress::cuda;

// The box at (x, y) of a matrix of bytes, out of its swizzle, by every block of the cluster. In a cluster the blocks share the work: each
// fetches its part of the rows for all. `waits`: for the copy, as one must.
__global__ void fetch(const __grid_constant__ CUtensorMap map, int rows, int x, int y, bool waits, unsigned char* out) {
  unsigned char* const tile = dynamic_shared<unsigned char>();
  Barrier* const barrier = reinterpret_cast<Barrier*>(tile + rows * 128);
  const unsigned rank = cluster_rank(), blocks = static_cast<unsigned>(emulation::machine.blocks->size());
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  cluster_barrier();
  if (threadIdx.x == 0) {
    barrier_arrive_expect(barrier, static_cast<unsigned>(rows) * 128);
    const int part = rows / static_cast<int>(blocks), first = part * static_cast<int>(rank);
    copy_box<true>(tile + first * 128, &map, barrier, x, y + first, static_cast<uint16_t>((1u << blocks) - 1));
  }
  if (waits) barrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < rows * 128; i += static_cast<int>(blockDim.x))
    out[static_cast<int>(rank) * rows * 128 + i] = tile[i / 128 * 128 + ((i / 16 % 8) ^ (i / 128 % 8)) * 16 + i % 16];
  if (waits) cluster_barrier();
}

// Sums of rows, fetched eight at a time into two stages. `waits`: until a stage has been read before it is overwritten.
__global__ void pipeline(const __grid_constant__ CUtensorMap map, int steps, bool waits, int* out) {
  unsigned char* const tile = dynamic_shared<unsigned char>();
  Barrier *const full = reinterpret_cast<Barrier*>(tile + 2048), *const empty = full + 2;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) barrier_init(full + s, 1), barrier_init(empty + s, 32);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 32) {
    for (int step = 0; threadIdx.x == 32 && step < steps; ++step) {
      if (waits) barrier_wait(empty + step % 2, static_cast<unsigned>(step / 2 % 2) ^ 1);
      barrier_arrive_expect(full + step % 2, 1024);
      copy_box<false>(tile + step % 2 * 1024, &map, full + step % 2, 0, step * 8);
    }
    return;
  }
  int sum = 0;
  for (int step = 0; step < steps; ++step) {
    barrier_wait(full + step % 2, static_cast<unsigned>(step / 2 % 2));
    for (int row = 0; row < 8; ++row)
      for (int c = 0; c < 4; ++c)
        sum +=
            tile[step % 2 * 1024 + row * 128 + (static_cast<int>(threadIdx.x) / 4 ^ row) * 16 + static_cast<int>(threadIdx.x) % 4 * 4 + c];
    barrier_arrive(empty + step % 2);
  }
  out[threadIdx.x] = sum;
}

enum Fault { none, no_fence, no_wait, no_commit, early_overwrite, odd_lane, half_group, wrong_stride, other_rows };

// (64 x 128) times (128 x n) int8, operands written by hand. `swizzle` as in the descriptor's last field.
template <int n>
__global__ void multiply(const int8_t* a, const int8_t* b, int swizzle, int fault, int32_t* out) {
  const int width = swizzle == 0 ? 16 : 256 >> swizzle, thread = static_cast<int>(threadIdx.x);
  char* const shared = dynamic_shared<char>();
  // Blocks of `width` bytes of k: rows of them one after the other, eight rows a pattern. Without swizzle, 128 bytes are a core matrix.
  const auto place = [&](int rows, int row, int k) {
    const int block = k / width, chunk = k % width / 16, moved = width == 16 ? 0 : chunk ^ (row * width / 128 % (width / 16));
    return block * rows * width + row * width + moved * 16 + k % 16;
  };
  for (int i = thread; i < 64 * 128; i += 128) shared[place(64, i / 128, i % 128)] = static_cast<char>(a[i]);
  for (int i = thread; i < n * 128; i += 128) shared[64 * 128 + place(n, i / 128, i % 128)] = static_cast<char>(b[i]);
  __syncthreads();
  if (fault == half_group && thread >= 64) return;
  int32_t d[n / 2] = {};
  if (fault != no_fence) wgmma_fence();
  for (int step = 0; step < 4; ++step) {
    const auto operand = [&](int rows, int from) {
      const uint64_t at =
          emulation::shared_address(shared + from) + static_cast<uint64_t>(step * 32 / width * rows * width + step * 32 % width);
      const uint64_t stride = fault == wrong_stride ? 1040 : static_cast<uint64_t>(8 * width);
      return at >> 4 | static_cast<uint64_t>(rows * width) >> 4 << 16 | stride >> 4 << 32 | static_cast<uint64_t>(swizzle) << 62;
    };
    const uint64_t from_a = operand(64, fault == odd_lane && thread == 5 ? 64 : 0);
    wgmma_s8<n>(d, from_a, operand(n, 64 * 128));
  }
  if (fault != no_commit) wgmma_commit();
  if (fault == early_overwrite && thread == 0) shared[70] ^= 1;
  if (fault == early_overwrite) __syncthreads();
  if (fault != no_wait) wgmma_wait<0>();
  for (int i = 0; i < n / 2; ++i) out[(thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
}

__global__ void uses_no_barrier() { barrier_wait(dynamic_shared<Barrier>(), 0); }
__global__ void waits_for_ever() {
  if (threadIdx.x == 0) barrier_init(dynamic_shared<Barrier>(), 2);
  __syncthreads();
  if (threadIdx.x == 0) barrier_arrive(dynamic_shared<Barrier>());
  barrier_wait(dynamic_shared<Barrier>(), 0);
}
__global__ void arrives_too_often() {
  barrier_init(dynamic_shared<Barrier>(), 1);
  Barrier* const barrier = dynamic_shared<Barrier>();
  barrier_arrive_expect(barrier, 16);
  barrier_arrive(barrier);
}
__global__ void sets_registers_alone() {
  if (threadIdx.x < 32) take_registers<232>();
}
__global__ void copies(const __grid_constant__ CUtensorMap map, bool fenced, int offset) {
  char* const tile = dynamic_shared<char>();
  Barrier* const barrier = reinterpret_cast<Barrier*>(tile + 2048);
  barrier_init(barrier, 1);
  if (fenced) barrier_init_fence();
  barrier_arrive_expect(barrier, 1024);
  copy_box<false>(tile + offset, &map, barrier, 0, 0);
  barrier_wait(barrier, 0);
}

std::string message;

template <typename... P, typename... A>
const char* start(unsigned blocks, unsigned threads, unsigned cluster, size_t shared, void (*kernel)(P...), A... arguments) {
  try {
    launch("test", Grid{dim3(blocks), threads, shared, cluster}, nullptr, kernel, arguments...);
    message.clear();
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

const char* with_map(const void* matrix, int64_t rows, int64_t bytes, int64_t stride, int box_rows,
                     const std::function<const char*(const CUtensorMap&)>& run) {
  try {
    CUtensorMap map;
    make_tensor_map(map, "test", matrix, rows, bytes, stride, box_rows);
    return run(map);
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

}  // namespace

#define TEST_API extern "C" __attribute__((visibility("default")))
TEST_API const char* run_fetch(const void* matrix, int64_t rows, int64_t bytes, int64_t stride, int box_rows, int x, int y, int blocks,
                               int waits, unsigned char* out) {
  return with_map(matrix, rows, bytes, stride, box_rows / blocks, [&](const CUtensorMap& map) {
    return start(blocks, 64, blocks, box_rows * 128 + 8, fetch, map, box_rows, x, y, waits != 0, out);
  });
}
TEST_API const char* run_pipeline(const void* matrix, int steps, int waits, int* out) {
  return with_map(matrix, steps * 8, 128, 128, 8,
                  [&](const CUtensorMap& map) { return start(1, 64, 1, 2048 + 32, pipeline, map, steps, waits != 0, out); });
}
TEST_API const char* run_multiply(const int8_t* a, const int8_t* b, int n, int swizzle, int fault, int32_t* out) {
  return start(1, 128, 1, (64 + n) * 128, n == 128 ? multiply<128> : multiply<256>, a, b, swizzle, fault, out);
}
TEST_API const char* run_hopper_fault(const char* which, const void* matrix) {
  const std::string name = which;
  if (name == "uses_no_barrier") return start(1, 32, 1, 128, uses_no_barrier);
  if (name == "waits_for_ever") return start(1, 32, 1, 128, waits_for_ever);
  if (name == "arrives_too_often") return start(1, 1, 1, 128, arrives_too_often);
  if (name == "sets_registers_alone") return start(1, 128, 1, 0, sets_registers_alone);
  if (name == "no_tensor_map") return start(1, 1, 1, 2304, copies, CUtensorMap{}, true, 0);
  if (name == "odd_stride") return with_map(matrix, 8, 128, 136, 8, [](const CUtensorMap&) { return ""; });
  return with_map(matrix, 8, 128, 128, 8, [&](const CUtensorMap& map) {
    if (name == "barrier_without_fence") return start(1, 1, 1, 2304, copies, map, false, 0);
    if (name == "copy_to_odd_place") return start(1, 1, 1, 2304, copies, map, true, 64);
    if (name == "copy_past_the_end") return start(1, 1, 1, 2304, copies, map, true, 1408);
    return "no such kernel";
  });
}
