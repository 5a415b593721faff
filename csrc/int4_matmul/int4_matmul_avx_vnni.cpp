// AVX-VNNI (Alder Lake and later, Zen 5): vpdpbusd in VEX encoding on 16 ymm registers, for CPUs without AVX-512.
// int4_matmul_avx512_vnni256.cpp is the same source in EVEX encoding.
#include "core/target.h"
#if PC_HAVE_AVX_VNNI
#define PC_VNNI256_TARGET "avx2,fma,f16c,avxvnni"
#define PC_DPBUSD _mm256_dpbusd_avx_epi32
#include "int4_matmul/vnni256.h"

namespace pycompress::int8_matmul {
extern const Kernel kAvxVnni;
}

namespace pycompress::int4_matmul {

extern const Kernel kAvxVnni;
const Kernel kAvxVnni = {"avx_vnni", Isa::avx_vnni, kNv, &int8_matmul::kAvxVnni, quantize_row, group_int8, group_float, store};

}  // namespace pycompress::int4_matmul
#endif
