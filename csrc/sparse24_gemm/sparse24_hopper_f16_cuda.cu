#include "sparse24_gemm/sparse24_gemm_hopper.cuh"

namespace pycompress::sparse24_gemm {

void run_hopper_f16(const CudaArgs& args, const cuda::Stream& stream) { launch_hopper<__half, __half>(args, stream); }

}  // namespace pycompress::sparse24_gemm
