#include "int8_matmul/int8_gemm.cuh"

namespace pycompress::int8_matmul {

void gemm_cuda_64x64(const GemmArgs& args, const cuda::Stream& stream) { launch_gemm<Tile<64, 64, 32, 32, 4, 4>>(args, stream); }

}  // namespace pycompress::int8_matmul
