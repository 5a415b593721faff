// Kernels for the tests of the emulator itself: right ones, and ones that would hang or corrupt on a device.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

namespace {

// Sum of a block's values: warp shuffles, then static shared memory.
template <typename T>
__device__ T block_sum(T value) {
  __shared__ T parts[32];
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) total += parts[i];
  __syncthreads();
  return total;
}

__global__ void sums(const int* in, int n, int* out) {
  int sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) sum += in[blockIdx.x * n + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void reverse(const int* in, int* out) {  // dynamic shared memory
  int* row = static_cast<int*>(emulation::dynamic_shared());
  row[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

__global__ void racy_reverse(const int* in, int* out) {  // lacks the barrier
  int* row = static_cast<int*>(emulation::dynamic_shared());
  row[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

__global__ void count(const int* in, unsigned* histogram, unsigned* tickets, unsigned* last) {  // atomics, last block done
  __shared__ bool is_last;
  atomicAdd(&histogram[in[blockIdx.x * blockDim.x + threadIdx.x]], 1u);
  __threadfence();
  if (threadIdx.x == 0) is_last = atomicInc(tickets, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (is_last && threadIdx.x == 0) *last = blockIdx.x;
}

__global__ void votes(unsigned* out) {
  const unsigned lane = threadIdx.x;
  const unsigned odd = __ballot_sync(0xffffffffu, lane & 1);
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  const unsigned sum = __reduce_add_sync(half, lane);
  const unsigned up = __shfl_up_sync(0xffffffffu, lane, 3), down = __shfl_down_sync(0xffffffffu, lane, 5, 8);
  out[lane] = odd, out[32 + lane] = sum, out[64 + lane] = up, out[96 + lane] = down;
}

// Each block of a cluster adds up what all hold, in static and in dynamic shared memory.
__global__ void cluster_sums(int* out) {
  __shared__ int fixed[32];
  int* dynamic = static_cast<int*>(emulation::dynamic_shared());
  const auto cluster = cooperative_groups::this_cluster();
  fixed[threadIdx.x] = static_cast<int>(100 * blockIdx.x + threadIdx.x);
  dynamic[threadIdx.x] = static_cast<int>(blockIdx.x);
  cluster.sync();
  int sum = 0;
  for (unsigned r = 0; r < cluster.num_blocks(); ++r)
    sum += *cluster.map_shared_rank(&fixed[threadIdx.x], r) + *cluster.map_shared_rank(&dynamic[threadIdx.x], r);
  cluster.sync();
  if (cluster.block_rank() == 0) *cluster.map_shared_rank(&dynamic[threadIdx.x], cluster.num_blocks() - 1) = sum;  // a remote write
  cluster.sync();
  if (cluster.block_rank() == cluster.num_blocks() - 1) sum -= dynamic[threadIdx.x];  // 0
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void deferred_copy(const int* in, int* out, bool waits) {
  int* row = static_cast<int*>(emulation::dynamic_shared());
  emulation::async_copy(row + 4 * threadIdx.x, in + 4 * threadIdx.x, 16);
  emulation::async_commit();
  if (waits) emulation::async_wait(0);
  __syncthreads();
  for (unsigned i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = row[4 * (blockDim.x - 1 - threadIdx.x) + i];
}

__global__ void half_barrier() {
  if (threadIdx.x < 16) __syncthreads();
}
__global__ void divergent_barrier() {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void lonely_shuffle(int* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void foreign_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xfu, 1, 0); }
__global__ void writes_past_shared() { static_cast<int*>(emulation::dynamic_shared())[8] = 1; }
__global__ void reads_unwritten_shared(int* out) {
  __shared__ float fixed[32];
  if (gridDim.x == 1) fixed[threadIdx.x] = 1.0f;  // never, which the compiler must not know
  out[threadIdx.x] = isnan(fixed[threadIdx.x]) && isnan(static_cast<float*>(emulation::dynamic_shared())[threadIdx.x]);
}

std::string message;

template <typename... P, typename... A>
const char* launch(dim3 grid, unsigned threads, unsigned cluster, size_t shared, void (*kernel)(P...), A... arguments) {
  cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension, {}};
  attribute.val.clusterDim = {cluster, 1, 1};
  const cudaLaunchConfig_t config{grid, threads, shared, nullptr, &attribute, 1};
  try {
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    message = error == cudaSuccess ? "" : cudaGetErrorString(error);
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

}  // namespace

#define TEST_API extern "C" __attribute__((visibility("default")))
TEST_API const char* run_sums(const int* in, int rows, int n, int threads, int* out) {
  return launch(rows, threads, 1, 0, sums, in, n, out);
}
TEST_API const char* run_reverse(const int* in, int n, int* out) { return launch(1, n, 1, 4 * n, reverse, in, out); }
TEST_API const char* run_racy_reverse(const int* in, int n, int* out) { return launch(1, n, 1, 4 * n, racy_reverse, in, out); }
TEST_API const char* run_count(const int* in, int blocks, unsigned* histogram, unsigned* tickets, unsigned* last) {
  return launch(blocks, 64, 1, 0, count, in, histogram, tickets, last);
}
TEST_API const char* run_votes(unsigned* out) { return launch(1, 32, 1, 0, votes, out); }
TEST_API const char* run_cluster_sums(int clusters, int size, int* out) {
  return launch(clusters * size, 32, size, 128, cluster_sums, out);
}
TEST_API const char* run_deferred_copy(const int* in, int* out, int waits) {
  return launch(1, 32, 1, 512, deferred_copy, in, out, waits != 0);
}
TEST_API const char* run_faulty(const char* which, int* out) {
  const std::string name = which;
  if (name == "half_barrier") return launch(1, 32, 1, 0, half_barrier);
  if (name == "divergent_barrier") return launch(1, 32, 1, 0, divergent_barrier);
  if (name == "lonely_shuffle") return launch(1, 32, 1, 0, lonely_shuffle, out);
  if (name == "foreign_mask") return launch(1, 32, 1, 0, foreign_mask, out);
  if (name == "writes_past_shared") return launch(1, 1, 1, 32, writes_past_shared);
  if (name == "too_many_threads") return launch(1, 1025, 1, 0, half_barrier);
  if (name == "too_much_shared") return launch(1, 1, 1, 49 * 1024, half_barrier);
  if (name == "odd_cluster") return launch(3, 1, 2, 0, half_barrier);
  if (name == "reads_unwritten_shared") return launch(2, 32, 1, 128, reads_unwritten_shared, out);
  return "no such kernel";
}
TEST_API float to_half_and_back(float x, int bf16) { return bf16 ? float(__nv_bfloat16(x)) : float(__half(x)); }
