// Matrix instructions with a 2:4 sparse A (sm_80 and up) and, for the emulator, the same from the PTX ISA, "Matrix Fragments for sparse
// mma.m16n8k32 / k64" and "Sparse matrix storage". A holds 32 bytes of kept values per row, in the fragment of the dense instruction
// (mma.cuh); B holds 64 bytes of k per column:
//
//   B: b[j] column g at bytes 16 j + 4 t .. 4 t + 3
//
// Metadata: four bits for each group of four along k, the places of its two kept values, rising. g = lane / 4, t = lane % 4:
//
//   16-bit floats (k = 32, 8 groups): lanes t = 2 selector and t = 2 selector + 1 hold groups 0..3 and 4..7: row g in the lower half of
//                                     the word, row g + 8 in the upper one
//   int8 (k = 64, 16 groups):         all lanes: t = 0 row g, groups 0..7; t = 1 row g + 8, groups 0..7; t = 2 and 3 groups 8..15
//
// (The same places that CUTLASS's reorder_meta puts them; tools/util/include/cutlass/util/host_reorder.h.)
#pragma once
#include "core/cuda/mma.cuh"

namespace pycompress::cuda {

#ifdef PYCOMPRESS_CUDA_EMULATION
namespace emulated {

struct SparseFragments {
  uint32_t a[4], b[4], e;
};

template <class Element, class Accumulator>
void mma_sparse(Accumulator (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e, int selector, int line) {
  constexpr int kSize = static_cast<int>(sizeof(Element)), kPer = 4 / kSize, kStored = 32 / kSize;
  const auto all = emulation::gather(0xffffffffu, SparseFragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, e}, "mma.sp", line);
  const auto element = [](uint32_t word, int i) {
    Element value;
    std::memcpy(&value, reinterpret_cast<const char*>(&word) + i * kSize, sizeof(Element));
    return static_cast<Accumulator>(value);
  };
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int group = 0; group < kStored / 2; ++group) {
      const int t = kSize == 2 ? 2 * selector + group / 4 : group / 8 * 2 + row / 8;
      const int shift = kSize == 2 ? row / 8 * 16 + group % 4 * 4 : group % 8 * 4;
      const uint32_t places = all[static_cast<size_t>(row % 8 * 4 + t)].e >> shift & 15u;
      if ((places & 3u) >= places >> 2) emulation::fail("mma.sp: the places in ordered metadata must rise");
      for (int kept = 0; kept < 2; ++kept) {
        const int stored = 2 * group + kept, k = 4 * group + static_cast<int>(places >> (2 * kept) & 3u);
        const auto& from_a = all[static_cast<size_t>(row % 8 * 4 + stored % (kStored / 2) / kPer)];
        const auto& from_b = all[static_cast<size_t>(column * 4 + k % (4 * kPer) / kPer)];
        c[i] += element(from_a.a[row / 8 + 2 * (stored / (kStored / 2))], stored % kPer) * element(from_b.b[k / (4 * kPer)], k % kPer);
      }
    }
  }
}

}  // namespace emulated
#endif

// c += a * b with a 16 x k sparse a: int8_t to int32 (k = 64), __nv_bfloat16 or __half to float (k = 32). kSelector: see above, 0 for int8.
template <class T, int kSelector, class Accumulator>
__device__ __forceinline__ void mma_sparse(Accumulator (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t e PYCOMPRESS_CALL_LINE) {
#ifdef PYCOMPRESS_CUDA_EMULATION
  emulated::mma_sparse<T>(c, a, b, e, kSelector, line);
#else
  if constexpr (std::is_same_v<T, int8_t>) {
    static_assert(kSelector == 0);
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "
        "{%0, %1, %2, %3}, %12, 0;"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "
        "{%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e), "n"(kSelector));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "
        "{%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e), "n"(kSelector));
  }
#endif
}

}  // namespace pycompress::cuda
