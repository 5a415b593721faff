#include "sparse24_gemm/sparse24_gemm_hopper.cuh"

namespace pycompress::sparse24_gemm {

void run_hopper_i8(const CudaArgs& args, const cuda::Stream& stream) {
  if (args.out_dtype == DType::f32)
    launch_hopper<int8_t, float>(args, stream);
  else if (args.out_dtype == DType::bf16)
    launch_hopper<int8_t, __nv_bfloat16>(args, stream);
  else
    launch_hopper<int8_t, __half>(args, stream);
}

}  // namespace pycompress::sparse24_gemm
