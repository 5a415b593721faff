// Matrix instructions of a warp (sm_80 and up) and, for the emulator, the same from the fragment tables of the PTX ISA, "Matrix
// Fragments for mma.m16n8k16 / k32" and "ldmatrix". With g = lane / 4 and t = lane % 4, a register holds four int8 (k32) or two
// 16-bit floats (k16):
//
//   A (16 x k): a[0] row g, a[1] row g + 8, both at k = t * w; a[2], a[3] the same rows at k = t * w + k/2      (w = 4 or 2)
//   B (k x 8):  b[0] column g at k = t * w; b[1] at k = t * w + k/2
//   C (16 x 8): c[0], c[1] row g, columns 2t and 2t + 1; c[2], c[3] row g + 8
//
// Every lane of the warp calls them together.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/cuda/call_line.cuh"

namespace pycompress::cuda {

#ifdef PYCOMPRESS_CUDA_EMULATION
namespace emulated {

struct Fragments {
  uint32_t a[4], b[2];
};

template <class Element, class Accumulator>
void mma(Accumulator (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  constexpr int kPerRegister = 4 / static_cast<int>(sizeof(Element)), kHalf = 4 * kPerRegister;
  const auto all = emulation::gather(0xffffffffu, Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, "mma", line);
  const auto element = [](uint32_t word, int i) {
    Element e;
    std::memcpy(&e, reinterpret_cast<const char*>(&word) + i * static_cast<int>(sizeof(Element)), sizeof(Element));
    return static_cast<Accumulator>(e);
  };
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 2 * kHalf; ++k) {
      const int t = k % kHalf / kPerRegister, in = k % kPerRegister, upper = k / kHalf;
      const auto& from_a = all[static_cast<size_t>(row % 8 * 4 + t)];
      const auto& from_b = all[static_cast<size_t>(column * 4 + t)];
      c[i] += element(from_a.a[row / 8 + 2 * upper], in) * element(from_b.b[upper], in);
    }
  }
}

}  // namespace emulated
#endif

// c += a * b: s8 x s8 -> s32, 16 x 8 x 32.
__device__ __forceinline__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PYCOMPRESS_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulated::mma<int8_t>(c, a, b, line);
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// c += a * b: bfloat16 or float16 (T) to float32, 16 x 8 x 16.
template <class T>
__device__ __forceinline__ void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PYCOMPRESS_CALL_LINE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulated::mma<T>(c, a, b, line);
#else
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 16-byte matrices out of shared memory: lane i names row i % 8 of matrix i / 8 (16 aligned bytes); r[j] becomes bytes
// 4t..4t+3 of row g of matrix j.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row PYCOMPRESS_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("ldmatrix: rows must be aligned to 16 bytes");
  const auto rows = emulation::gather(0xffffffffu, row, "ldmatrix", line);
  const int lane = emulation::lane();
  for (int j = 0; j < 4; ++j) {
    const auto* from = static_cast<const unsigned char*>(rows[static_cast<size_t>(j * 8 + lane / 4)]);
    std::memcpy(&r[j], from + lane % 4 * 4, 4);
  }
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

}  // namespace pycompress::cuda
