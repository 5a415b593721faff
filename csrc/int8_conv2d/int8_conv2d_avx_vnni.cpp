// AVX-VNNI (Alder Lake and later, Zen 5): VNNI in VEX encoding on 16 ymm registers, for CPUs without AVX-512.
// int8_conv2d_avx512_vnni256.cpp is the same source in EVEX encoding.
#include "core/target.h"
#if PC_HAVE_AVX_VNNI
#define PC_VNNI256_TARGET "avx2,fma,f16c,avxvnni"
#define PC_DPWSSD _mm256_dpwssd_avx_epi32
#include "int8_conv2d/vnni256.h"

namespace pycompress::int8_matmul {
extern const Kernel kAvxVnni;
}

namespace pycompress::int8_conv2d {

extern const Kernel kAvxVnni;
const Kernel kAvxVnni = record("avx_vnni", Isa::avx_vnni, &int8_matmul::kAvxVnni);

}  // namespace pycompress::int8_conv2d
#endif
