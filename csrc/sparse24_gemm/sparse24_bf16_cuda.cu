#include "sparse24_gemm/sparse24_gemm.cuh"

namespace pycompress::sparse24_gemm {

void run_bf16(int config, const CudaArgs& args, const cuda::Stream& stream) {
  launch_config<__nv_bfloat16, __nv_bfloat16>(config, args, stream);
}

}  // namespace pycompress::sparse24_gemm
