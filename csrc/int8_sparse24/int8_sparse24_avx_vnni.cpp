// AVX-VNNI (Alder Lake and later, Zen 5): vpdpbusd in VEX encoding on 16 ymm registers, for CPUs without AVX-512.
// Measured on a Zen 5: 78 of 96 MAC per cycle (shuffles and products share a pipe there), 1.4 times the dense kernel.
#include "core/target.h"
#if PC_HAVE_AVX_VNNI
#define PC_VNNI256_TARGET "avx2,fma,f16c,avxvnni"
#define PC_DPBUSD _mm256_dpbusd_avx_epi32
#include "int8_sparse24/vnni256.h"

namespace pycompress::int8_sparse24 {

extern const Kernel kAvxVnni;
const Kernel kAvxVnni = {"avx_vnni",
                         Isa::avx_vnni,
                         kMr,
                         kNr,
                         amax,
                         widen,
                         narrow,
                         store_f32,
                         {16, 16, offset, quantize_row, tile<2>, nullptr, nullptr, 0},
                         {16, 16, offset, quantize_row, tile<1>, nullptr, nullptr, 0}};

}  // namespace pycompress::int8_sparse24
#endif
