#include "sparse24_gemm/sparse24_gemm.cuh"

namespace pycompress::sparse24_gemm {

void run_f16(int config, const CudaArgs& args, const cuda::Stream& stream) { launch_config<__half, __half>(config, args, stream); }

}  // namespace pycompress::sparse24_gemm
