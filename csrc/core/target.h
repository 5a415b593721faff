// Opens and closes a region compiled for one instruction set, inside a file compiled for the baseline.
//
//   #include <immintrin.h>          // headers stay outside: an inline function of theirs, compiled with AVX and
//   PC_TARGET_BEGIN("avx2,fma")     // picked by the linker for everybody, would crash old CPUs (FBGEMM#46)
//   ... static functions only, no STL ...
//   PC_TARGET_END
//
// MSVC needs no region: it accepts every intrinsic everywhere.
#pragma once
#include <cstdint>
#include <cstring>

#define PC_PRAGMA(x) _Pragma(#x)

#if defined(__clang__)
#define PC_TARGET_BEGIN(isa) PC_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PC_TARGET_END PC_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define PC_TARGET_BEGIN(isa) PC_PRAGMA(GCC push_options) PC_PRAGMA(GCC target(isa))
#define PC_TARGET_END PC_PRAGMA(GCC pop_options)
#else
#define PC_TARGET_BEGIN(isa)
#define PC_TARGET_END
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define PC_X86 1
#else
#define PC_X86 0
#endif

#if defined(__aarch64__) || defined(_M_ARM64)
#define PC_ARM64 1
#else
#define PC_ARM64 0
#endif

// Compilers that know the VEX encoding of VNNI.
#if PC_X86 && ((defined(__clang__) && __clang_major__ >= 13) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11) || \
               (defined(_MSC_VER) && !defined(__clang__) && _MSC_VER >= 1930))
#define PC_HAVE_AVX_VNNI 1
#else
#define PC_HAVE_AVX_VNNI 0
#endif

// arm_neon.h declares intrinsics above the baseline for GCC, and for Clang from 17 on; older ones only with a -march flag.
#if PC_ARM64 && defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 17)
#define PC_HAVE_NEON_EXTENSIONS 1
#else
#define PC_HAVE_NEON_EXTENSIONS 0
#endif
#if defined(__clang__)
#define PC_NEON_DOTPROD "dotprod"
#define PC_NEON_I8MM "dotprod,i8mm"
#else
#define PC_NEON_DOTPROD "arch=armv8.2-a+dotprod"
#define PC_NEON_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif

// Inner helpers must inline: a call in a microkernel would spill the register tile. Not under AddressSanitizer, where only the
// loads and stores count and GCC takes ten minutes for a kernel of inlined lambdas.
#if defined(__SANITIZE_ADDRESS__)
#define PC_INLINE inline
#define PC_RESTRICT __restrict__
#elif defined(__GNUC__)
#define PC_INLINE inline __attribute__((always_inline))
#define PC_RESTRICT __restrict__
#else
#define PC_INLINE __forceinline
#define PC_RESTRICT __restrict
#endif

namespace pycompress {

// Four bytes from any address: a convolution's pixels lie a number of channels apart, so a row of operands starts anywhere.
static PC_INLINE int32_t load32(const char* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace pycompress
