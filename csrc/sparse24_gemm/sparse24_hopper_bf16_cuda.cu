#include "sparse24_gemm/sparse24_gemm_hopper.cuh"

namespace pycompress::sparse24_gemm {

void run_hopper_bf16(const CudaArgs& args, const cuda::Stream& stream) { launch_hopper<__nv_bfloat16, __nv_bfloat16>(args, stream); }

}  // namespace pycompress::sparse24_gemm
