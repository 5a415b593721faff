#include "int8_matmul/int8_gemm.cuh"

namespace pycompress::int8_matmul {

void gemm_cuda_64x128(const GemmArgs& args, const cuda::Stream& stream) { launch_gemm<Tile<64, 128, 32, 64, 4, 2>>(args, stream); }

}  // namespace pycompress::int8_matmul
