// The AVX-VNNI kernel in EVEX encoding: never the fastest where it runs, but there it shows that the shared source is right.
#include "core/target.h"
#if PC_X86
#define PC_VNNI256_TARGET "avx2,fma,f16c,avx512f,avx512vl,avx512vnni"
#define PC_DPBUSD _mm256_dpbusd_epi32
#include "int8_sparse24/vnni256.h"

namespace pycompress::int8_sparse24 {

extern const Kernel kAvx512Vnni256;
const Kernel kAvx512Vnni256 = {"avx512_vnni256",
                               Isa::avx512_vnni,
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
