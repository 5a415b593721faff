// Matrix instructions of a warpgroup (sm_90a): four neighbouring warps multiply 64 rows of A with n columns of B, both in shared memory, 32
// bytes of k at a time, and add to registers. They run on while the threads go on:
//
//   wgmma_fence(); wgmma_s8(...); ...; wgmma_commit(); ... wgmma_wait<pending groups>();
//
// Until a wait has returned for its group, the sums must not be touched and the operands must stay as they are. Of the sums, warp w holds
// rows 16 w .. 16 w + 15. With g = lane / 4 and t = lane % 4, d[4 j + 2 h + c] is row g + 8 h, column 8 j + 2 t + c.
// (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk32", "Matrix Descriptor Format", "Strides".)
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/cuda/mbarrier.cuh"

namespace pycompress::cuda {

// An operand whose rows (A) or columns (B) are kRowBytes (128 or 64) bytes of k each, one after the other, with swizzle of that width, from
// a multiple of 1024 bytes on. The pattern repeats after eight of them. Adding 2 i to the descriptor moves it by 32 i bytes along k, within
// the row.
template <int kRowBytes = 128>
__device__ __forceinline__ uint64_t wgmma_operand(const void* tile) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
#ifdef PYCOMPRESS_CUDA_EMULATION
  const uint64_t address = emulation::shared_address(tile);
#else
  const uint64_t address = shared_address(tile);
#endif
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2, kStride = 8 * kRowBytes,
                     kUnused = 1;  // distances along k mean nothing with swizzle
  return (address >> 4 & 0x3fff) | kUnused << 16 | kStride >> 4 << 32 | kSwizzle << 62;
}

// Orders what the threads did to the sums (and to other registers of wgmma) before the instructions that follow.
__device__ __forceinline__ void wgmma_fence(PYCOMPRESS_ONLY_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::wgmma_fence(line);
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit(PYCOMPRESS_ONLY_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::wgmma_commit(line);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait(PYCOMPRESS_ONLY_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::wgmma_wait(kPending, line);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Sixteen operands of an asm statement each, by their numbers or by the registers d[i] .. d[i + 15].
#define PYCOMPRESS_D16(c, i)                                                                                                    \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7]), c(d[i + 8]), c(d[i + 9]), \
      c(d[i + 10]), c(d[i + 11]), c(d[i + 12]), c(d[i + 13]), c(d[i + 14]), c(d[i + 15])
#define PYCOMPRESS_D64(c, i) PYCOMPRESS_D16(c, i), PYCOMPRESS_D16(c, i + 16), PYCOMPRESS_D16(c, i + 32), PYCOMPRESS_D16(c, i + 48)
#define PYCOMPRESS_N64                                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
  "%27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYCOMPRESS_N128                                                                                                             \
  PYCOMPRESS_N64                                                                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, " \
  "%89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d += a * b: s8 x s8 -> s32, 64 x kN x 32.
template <int kN>
__device__ __forceinline__ void wgmma_s8(int32_t (&d)[kN / 2], uint64_t a, uint64_t b PYCOMPRESS_CALL_LINE) {
  static_assert(kN == 128 || kN == 256);
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::wgmma<int8_t>(d, a, b, line);
#else
  if constexpr (kN == 128)
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" PYCOMPRESS_N64 "}, %64, %65, 1;"
                 : PYCOMPRESS_D64("+r", 0)
                 : "l"(a), "l"(b));
  else
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" PYCOMPRESS_N128 "}, %128, %129, 1;"
                 : PYCOMPRESS_D64("+r", 0), PYCOMPRESS_D64("+r", 64)
                 : "l"(a), "l"(b));
#endif
}

// d += a * b with a 2:4 sparse a, 64 x 256, 64 bytes of k of b: int8_t to int32_t (k = 64), __nv_bfloat16 or __half to float (k = 32). a
// holds 32 bytes of kept values per row, e their places: as in mma_sparse.cuh, each warp for its own 16 rows, 16-bit floats with selector
// 0. (CUTLASS's ELayout_64x64 and ELayout_64x32 say the same; include/cute/atom/mma_traits_sm90_gmma_sparse.hpp.)
template <class T, class Sum>
__device__ __forceinline__ void wgmma_sparse(Sum (&d)[128], uint64_t a, uint64_t b, uint32_t e PYCOMPRESS_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulation::wgmma_sparse<T>(d, a, b, e, line);
#else
  if constexpr (std::is_same_v<T, int8_t>)
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n256k64.s32.s8.s8 {" PYCOMPRESS_N128 "}, %128, %129, %130, 0, 1;"
                 : PYCOMPRESS_D64("+r", 0), PYCOMPRESS_D64("+r", 64)
                 : "l"(a), "l"(b), "r"(e));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n256k32.f32.bf16.bf16 {" PYCOMPRESS_N128 "}, %128, %129, %130, 0, 1, 1, 1, 0, 0;"
                 : PYCOMPRESS_D64("+f", 0), PYCOMPRESS_D64("+f", 64)
                 : "l"(a), "l"(b), "r"(e));
  else
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n256k32.f32.f16.f16 {" PYCOMPRESS_N128 "}, %128, %129, %130, 0, 1, 1, 1, 0, 0;"
                 : PYCOMPRESS_D64("+f", 0), PYCOMPRESS_D64("+f", 64)
                 : "l"(a), "l"(b), "r"(e));
#endif
}

#undef PYCOMPRESS_D16
#undef PYCOMPRESS_D64
#undef PYCOMPRESS_N64
#undef PYCOMPRESS_N128

}  // namespace pycompress::cuda
