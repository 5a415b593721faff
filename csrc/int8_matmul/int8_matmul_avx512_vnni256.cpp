// The AVX-VNNI kernel in EVEX encoding: never the fastest where it runs, but there it shows that the shared source is right.
#include "core/target.h"
#if PC_X86
#define PC_VNNI256_TARGET "avx2,fma,f16c,avx512f,avx512vl,avx512vnni"
#define PC_DPBUSD _mm256_dpbusd_epi32
#define PC_DPBUSD_TEXT "%{evex%} vpdpbusd"
#include "int8_matmul/vnni256.h"

namespace pycompress::int8_matmul {

extern const Kernel kAvx512Vnni256;
const Kernel kAvx512Vnni256 = {"avx512_vnni256", Isa::avx512_vnni, kMr,     kNr,  16,        kKr,    1,       amax,    range,
                               quantize_row,     load_row,         widen,   tile, store_f32, narrow, nullptr, nullptr, false,
                               linear,           quantize_rows,    activate};

}  // namespace pycompress::int8_matmul
#endif
