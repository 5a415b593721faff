#include "int8_matmul/int8_gemm.cuh"

namespace pycompress::int8_matmul {

void gemm_cuda_128x256(const GemmArgs& args, const cuda::Stream& stream) { launch_gemm<Tile<128, 256, 64, 64, 4, 1>>(args, stream); }

}  // namespace pycompress::int8_matmul
