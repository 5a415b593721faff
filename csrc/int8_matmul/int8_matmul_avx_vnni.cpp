// AVX-VNNI (Alder Lake and later, Zen 5): vpdpbusd in VEX encoding on 16 ymm registers, for CPUs without AVX-512.
// int8_matmul_avx512_vnni256.cpp is the same source in EVEX encoding.
#include "core/target.h"
#if PC_HAVE_AVX_VNNI
#define PC_VNNI256_TARGET "avx2,fma,f16c,avxvnni"
#define PC_DPBUSD _mm256_dpbusd_avx_epi32
#define PC_DPBUSD_TEXT "%{vex%} vpdpbusd"
#include "int8_matmul/vnni256.h"

namespace pycompress::int8_matmul {

extern const Kernel kAvxVnni;
const Kernel kAvxVnni = {"avx_vnni", Isa::avx_vnni, kMr,          kNr,      16,     kKr,           1,
                         amax,       range,         quantize_row, load_row, widen,  tile,          store_f32,
                         narrow,     nullptr,       nullptr,      false,    linear, quantize_rows, activate};

}  // namespace pycompress::int8_matmul
#endif
