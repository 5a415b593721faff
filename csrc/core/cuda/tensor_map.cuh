// Copies of boxes out of tensors in global memory by the copy engine (sm_90): a tensor map, made on the host, says where the tensor is and
// what a box is; one thread starts a copy, which ends at a barrier in shared memory (mbarrier.cuh).
//
// The rows of a box lie one after the other in shared memory, with swizzle, as wgmma.cuh wants them: if they have 128 bytes, 16-byte chunk
// c of row r is at place c ^ r % 8; if they have 64, at c ^ r / 2 % 4. Boxes start at multiples of 1024 bytes. What is outside of the
// tensor becomes 0 and counts as bytes all the same.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/cuda/launch.cuh"
#include "core/cuda/mbarrier.cuh"

namespace pycompress::cuda {

constexpr int kBoxBytes = 128;  // of a row

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                     const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, through the runtime: the module does not link the driver.
inline EncodeTensorMap tensor_map_encoder(const char* what) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), what);
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), what);
#endif
  if (result != cudaDriverEntryPointSuccess || !found)
    throw std::runtime_error(std::string(what) + ": the driver has no cuTensorMapEncodeTiled; kernels for Hopper need one for CUDA 12.0");
  return reinterpret_cast<EncodeTensorMap>(found);
}

// Sizes in elements, the innermost first; strides in bytes; everything in memory aligned to 16 bytes, sides of a box at most 256.
// By reference: g++ 12 does not align the temporary for a result as this type wants.
template <size_t kRank>
void make_tensor_map(CUtensorMap& map, const char* what, CUtensorMapDataType type, const void* tensor, const cuuint64_t (&size)[kRank],
                     const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank], CUtensorMapSwizzle swizzle) {
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) step = 1;
  const CUresult result =
      tensor_map_encoder(what)(&map, type, kRank, const_cast<void*>(tensor), size, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                               swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return;
  std::string text = std::string(what) + ": the driver refused a tensor map for sizes";
  for (const auto side : size) text += " " + std::to_string(side);
  text += " and strides";
  for (const auto stride : strides) text += " " + std::to_string(stride);
  throw std::runtime_error(text + " (CUDA driver error " + std::to_string(static_cast<int>(result)) + ")");
}

// Of a matrix of `rows` rows of `row_bytes` bytes, `stride` bytes apart, `box_rows` rows of 128 bytes.
inline void make_tensor_map(CUtensorMap& map, const char* what, const void* matrix, int64_t rows, int64_t row_bytes, int64_t stride,
                            int box_rows) {
  make_tensor_map<2>(map, what, CU_TENSOR_MAP_DATA_TYPE_UINT8, matrix, {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)},
                     {static_cast<cuuint64_t>(stride)}, {kBoxBytes, static_cast<cuuint32_t>(box_rows)}, CU_TENSOR_MAP_SWIZZLE_128B);
}

// `map`: in a __grid_constant__ parameter.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::check_tensor_map(map);
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// Starts the copy of the box whose first element is element x of row y. kMulticast: into the same place of every block of the cluster whose
// bit is set in `blocks`, where the same barrier counts the bytes.
template <bool kMulticast>
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, Barrier* barrier, int32_t x, int32_t y, uint16_t blocks = 0) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::copy_box(to, map, barrier, {x, y}, kMulticast ? blocks : 0u);
#else
  if constexpr (kMulticast)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::
            "r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
#endif
}

// The same of a tensor of four dimensions.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, Barrier* barrier, int32_t x, int32_t y, int32_t z, int32_t w) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::copy_box(to, map, barrier, {x, y, z, w}, 0);
#else
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
#endif
}

}  // namespace pycompress::cuda
