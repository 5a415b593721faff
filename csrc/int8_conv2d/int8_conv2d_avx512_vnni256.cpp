// The AVX-VNNI kernel in EVEX encoding: never the fastest where it runs, but there it shows that the shared source is right.
#include "core/target.h"
#if PC_X86
#define PC_VNNI256_TARGET "avx2,fma,f16c,avx512f,avx512vl,avx512vnni"
#define PC_DPWSSD _mm256_dpwssd_epi32
#include "int8_conv2d/vnni256.h"

namespace pycompress::int8_matmul {
extern const Kernel kAvx512Vnni256;
}

namespace pycompress::int8_conv2d {

extern const Kernel kAvx512Vnni256;
const Kernel kAvx512Vnni256 = record("avx512_vnni256", Isa::avx512_vnni, &int8_matmul::kAvx512Vnni256);

}  // namespace pycompress::int8_conv2d
#endif
