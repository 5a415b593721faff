// The AVX-VNNI kernel in EVEX encoding: never the fastest where it runs, but there it shows that the shared source is right.
#include "core/target.h"
#if PC_X86
#define PC_VNNI256_TARGET "avx2,fma,f16c,avx512f,avx512vl,avx512vnni"
#define PC_DPBUSD _mm256_dpbusd_epi32
#include "int4_matmul/vnni256.h"

namespace pycompress::int8_matmul {
extern const Kernel kAvx512Vnni256;
}

namespace pycompress::int4_matmul {

extern const Kernel kAvx512Vnni256;
const Kernel kAvx512Vnni256 = {"avx512_vnni256", Isa::avx512_vnni, kNv,         &int8_matmul::kAvx512Vnni256,
                               quantize_row,     group_int8,       group_float, store};

}  // namespace pycompress::int4_matmul
#endif
