#include "weight_only/int4_int8_gemm.cuh"

namespace pycompress::weight_only {

void int4_int8_gemm_64x64(const Int8ActArgs& args, const cuda::Stream& stream) {
  run_int4_int8<Int4Tile<64, 64, 32, 32, 4, 2>>(args, stream);
}

}  // namespace pycompress::weight_only
