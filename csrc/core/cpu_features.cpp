#include "core/cpu_features.h"

#include <cstdint>
#include <cstring>

#include "core/target.h"

#if PC_X86
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif PC_ARM64 && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pycompress {
namespace {

struct Features {
  bool has[static_cast<int>(Isa::kCount)] = {};
  char vendor[13] = {};
};

#if PC_X86

struct Regs {
  uint32_t a, b, c, d;
};

Regs cpuid(uint32_t leaf, uint32_t subleaf) {
  Regs r{};
#if defined(_MSC_VER)
  int v[4];
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {uint32_t(v[0]), uint32_t(v[1]), uint32_t(v[2]), uint32_t(v[3])};
#else
  __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
#endif
  return r;
}

// XCR0: which register files the OS saves. Called only where cpuid reports OSXSAVE.
uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t(hi) << 32) | lo;
#endif
}

int detect_l1() {
  char vendor[12];
  const Regs l0 = cpuid(0, 0);
  std::memcpy(vendor, &l0.b, 4), std::memcpy(vendor + 4, &l0.d, 4), std::memcpy(vendor + 8, &l0.c, 4);
  const bool amd = std::memcmp(vendor, "AuthenticAMD", 12) == 0;
  const uint32_t leaf = amd ? 0x8000001d : 4;
  if (cpuid(leaf & 0x80000000, 0).a < leaf) return 0;
  for (uint32_t i = 0; i < 8; ++i) {
    const Regs r = cpuid(leaf, i);
    if ((r.a & 31) == 0) break;                  // no further cache
    if ((r.a & 31) == 1 && (r.a >> 5 & 7) == 1)  // data, level 1
      return static_cast<int>(((r.b >> 22) + 1) * ((r.b >> 12 & 0x3ff) + 1) * ((r.b & 0xfff) + 1) * (r.c + 1));
  }
  return 0;
}

Features detect() {
  Features f;
  const Regs l0 = cpuid(0, 0);
  std::memcpy(f.vendor, &l0.b, 4);
  std::memcpy(f.vendor + 4, &l0.d, 4);
  std::memcpy(f.vendor + 8, &l0.c, 4);
  if (l0.a < 7) return f;
  const Regs l1 = cpuid(1, 0), l7 = cpuid(7, 0);
  const Regs l71 = l7.a >= 1 ? cpuid(7, 1) : Regs{};
  const auto bit = [](uint32_t r, int i) { return (r >> i & 1) != 0; };
  if (!bit(l1.c, 27)) return f;  // OSXSAVE
  const uint64_t os = xcr0();
  const bool os_ymm = (os & 0x6) == 0x6, os_zmm = (os & 0xe6) == 0xe6;
  const bool avx2 = os_ymm && bit(l1.c, 28) && bit(l1.c, 12) && bit(l1.c, 29) && bit(l7.b, 5);             // AVX, FMA, F16C, AVX2
  const bool avx512 = avx2 && os_zmm && bit(l7.b, 16) && bit(l7.b, 17) && bit(l7.b, 30) && bit(l7.b, 31);  // F, DQ, BW, VL
  f.has[int(Isa::avx2)] = avx2;
  f.has[int(Isa::avx_vnni)] = avx2 && bit(l71.a, 4);
  f.has[int(Isa::avx512)] = avx512;
  f.has[int(Isa::avx512_vnni)] = avx512 && bit(l7.c, 11);
  f.has[int(Isa::avx512_vbmi)] = f.has[int(Isa::avx512_vnni)] && bit(l7.c, 1);
  return f;
}

#elif PC_ARM64

int detect_l1() { return 0; }

Features detect() {
  Features f;
  f.has[int(Isa::neon)] = true;  // part of the aarch64 baseline
#if defined(__linux__)
  const unsigned long cap = getauxval(AT_HWCAP), cap2 = getauxval(AT_HWCAP2);
  f.has[int(Isa::neon_dotprod)] = (cap >> 20 & 1) != 0;                                 // HWCAP_ASIMDDP
  f.has[int(Isa::neon_i8mm)] = f.has[int(Isa::neon_dotprod)] && (cap2 >> 13 & 1) != 0;  // HWCAP2_I8MM
#elif defined(__APPLE__)
  f.has[int(Isa::neon_dotprod)] = true;  // every Apple silicon Mac; i8mm only from M2 on, so it is not assumed
#endif
  return f;
}

#else

int detect_l1() { return 0; }

Features detect() { return {}; }

#endif

const Features& features() {
  static const Features f = detect();
  return f;
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[] = {"scalar",      "avx2", "avx_vnni",     "avx512",   "avx512_vnni",
                                      "avx512_vbmi", "neon", "neon_dotprod", "neon_i8mm"};
  return names[static_cast<int>(isa)];
}

bool isa_available(Isa isa) { return isa == Isa::scalar || features().has[static_cast<int>(isa)]; }

bool isa_implies(Isa level, Isa isa) {
  if (level == isa || isa == Isa::scalar) return true;
  switch (level) {
    case Isa::avx_vnni:
      return isa == Isa::avx2;
    case Isa::avx512:
      return isa == Isa::avx2;
    case Isa::avx512_vnni:
      return isa == Isa::avx512 || isa == Isa::avx2;
    case Isa::avx512_vbmi:
      return isa == Isa::avx512_vnni || isa == Isa::avx512 || isa == Isa::avx2;
    case Isa::neon_dotprod:
      return isa == Isa::neon;
    case Isa::neon_i8mm:
      return isa == Isa::neon_dotprod || isa == Isa::neon;
    default:
      return false;
  }
}

int l1_data_bytes() {
  static const int bytes = detect_l1();
  return bytes > 0 ? bytes : 32 * 1024;
}

const char* cpu_vendor() { return features().vendor; }

}  // namespace pycompress
