// Of the driver's interface, tensor maps: what cuTensorMapEncodeTiled accepts ("CUDA Driver API, Tensor Map Object Management") and the
// copies that the copy engine makes with one (PTX ISA, "Tensors", "Swizzling modes").
#pragma once
#include "cuda_runtime.h"
#include "mbarrier.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0, CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1, CU_TENSOR_MAP_DATA_TYPE_UINT32 = 2 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_32B = 1,
  CU_TENSOR_MAP_SWIZZLE_64B = 2,
  CU_TENSOR_MAP_SWIZZLE_128B = 3
};
enum CUtensorMapL2promotion {
  CU_TENSOR_MAP_L2_PROMOTION_NONE = 0,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

namespace emulation {

struct TensorMap {
  uint64_t magic;
  const unsigned char* base;
  uint64_t size[4], stride[3];  // elements; bytes
  uint32_t box[4], element, swizzle, rank;
};
inline constexpr uint64_t kTensorMap = 0x70616d726f736e65;

inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* size,
                                  const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                  CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  TensorMap m{kTensorMap, static_cast<const unsigned char*>(base), {1, 1, 1, 1}, {}, {1, 1, 1, 1}, 1u << type, swizzle, rank};
  const uint32_t widths[4] = {1u << 30, 32, 64, 128};
  if (rank < 1 || rank > 4 || reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(base) % 16 || !base)
    return CUDA_ERROR_INVALID_VALUE;
  for (uint32_t i = 0; i < rank; ++i) {
    m.size[i] = size[i], m.box[i] = box[i];
    if (size[i] == 0 || size[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    if (i == 0) continue;
    m.stride[i - 1] = strides[i - 1];
    if (strides[i - 1] % 16 || strides[i - 1] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
  }
  if (box[0] * m.element % 16 || box[0] * m.element > widths[swizzle]) return CUDA_ERROR_INVALID_VALUE;
  static_assert(sizeof m <= sizeof map->opaque);
  std::memcpy(map->opaque, &m, sizeof m);
  return CUDA_SUCCESS;
}

inline TensorMap check_tensor_map(const CUtensorMap* map) {
  TensorMap m;
  std::memcpy(&m, map->opaque, sizeof m);
  if (m.magic != kTensorMap) fail("tensor map: the copy engine was given something that cuTensorMapEncodeTiled did not make");
  if (reinterpret_cast<uintptr_t>(map) % 64) fail("tensor map: must be aligned to 64 bytes");
  return m;
}

// Copies a box into this block, or into the blocks of `blocks`. From the start to the end of the copy its place holds poison.
inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, const std::vector<int32_t>& first, unsigned blocks) {
  const TensorMap m = check_tensor_map(map);
  const uint32_t row_bytes = m.box[0] * m.element, rows = m.box[1] * m.box[2] * m.box[3], bytes = row_bytes * rows;
  const uint32_t width = m.swizzle ? 16u << m.swizzle : 0, at = shared_address(to);
  if (first.size() != m.rank) fail("cp.async.bulk.tensor: as many coordinates as the tensor map has dimensions");
  if (at % 128) fail("cp.async.bulk.tensor: shared memory must be aligned to 128 bytes");
  (void)load_barrier(barrier);
  Block& own = *machine.current->block;
  if (blocks == 0) blocks = 1u << own.rank;
  if (blocks >> machine.blocks->size()) fail("cp.async.bulk.tensor: multicast to a block that the cluster does not have");
  const auto offset = static_cast<unsigned char*>(to) - own.dynamic,
             barrier_offset = reinterpret_cast<unsigned char*>(barrier) - own.dynamic;
  if (static_cast<size_t>(offset) + bytes > own.dynamic_bytes) fail("cp.async.bulk.tensor: the box ends behind shared memory");
  for (unsigned r = 0; r < machine.blocks->size(); ++r) {
    if (!(blocks >> r & 1u)) continue;
    Block& block = (*machine.blocks)[r];
    if (block.alive == 0) fail("cp.async.bulk.tensor: multicast to a block that has left");
    std::memset(block.dynamic + offset, kPoison, bytes);
    engine_action([=, &block] {
      for (uint32_t row = 0; row < rows; ++row) {
        const uint32_t in_box[4] = {0, row % m.box[1], row / m.box[1] % m.box[2], row / m.box[1] / m.box[2]};
        bool row_inside = true;
        const unsigned char* from = m.base;
        for (uint32_t i = 1; i < m.rank; ++i) {
          const int64_t index = int64_t{first[i]} + in_box[i];
          row_inside = row_inside && index >= 0 && index < static_cast<int64_t>(m.size[i]);
          if (row_inside) from += index * static_cast<int64_t>(m.stride[i - 1]);
        }
        for (uint32_t column = 0; column < row_bytes; ++column) {
          const int64_t byte = int64_t{first[0]} * m.element + column;
          const bool inside = row_inside && byte >= 0 && byte < static_cast<int64_t>(m.size[0] * m.element);
          block.dynamic[offset + (swizzled(at + row * row_bytes + column, width) - at)] = inside ? from[byte] : 0;
        }
      }
      barrier_bytes(reinterpret_cast<uint64_t*>(block.dynamic + barrier_offset), bytes);
    });
  }
}

}  // namespace emulation

// ---- the way to the driver that does not link it
#define CUDART_VERSION 12050
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum { cudaEnableDefault = 0 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool found = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 && version >= 12000 && emulation::driver_has_tensor_maps;
  *function = found ? reinterpret_cast<void*>(&emulation::encode_tensor_map) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
