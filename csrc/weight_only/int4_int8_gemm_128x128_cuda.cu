#include "weight_only/int4_int8_gemm.cuh"

namespace pycompress::weight_only {

void int4_int8_gemm_128x128(const Int8ActArgs& args, const cuda::Stream& stream) {
  run_int4_int8<Int4Tile<128, 128, 32, 64, 3, 1>>(args, stream);
}

}  // namespace pycompress::weight_only
