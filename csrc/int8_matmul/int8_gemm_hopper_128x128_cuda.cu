#include "int8_matmul/int8_gemm_hopper.cuh"

namespace pycompress::int8_matmul {

void gemm_cuda_hopper_128x128(const GemmArgs& args, const cuda::Stream& stream) {
  launch_hopper<HopperTile<128, 128, 128, 6, 1>>(args, stream);
}

}  // namespace pycompress::int8_matmul
