#include "int8_matmul/int8_gemm.cuh"

namespace pycompress::int8_matmul {

void gemm_cuda_128x128(const GemmArgs& args, const cuda::Stream& stream) { launch_gemm<Tile<128, 128, 64, 64, 4, 2>>(args, stream); }

}  // namespace pycompress::int8_matmul
