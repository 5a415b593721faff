#include <cstring>
#include <stdexcept>
#include <string>

#include "sparse24_gemm/sparse24_gemm.cuh"

namespace pycompress::sparse24_gemm {

void run_i8(int config, const CudaArgs& args, const cuda::Stream& stream) {
  if (args.out_dtype == DType::f32)
    launch_config<int8_t, float>(config, args, stream);
  else if (args.out_dtype == DType::bf16)
    launch_config<int8_t, __nv_bfloat16>(config, args, stream);
  else
    launch_config<int8_t, __half>(config, args, stream);
}

namespace {

void run_hopper(const CudaArgs& args, const cuda::Stream& stream) {
  if (args.element == Element::i8) return run_hopper_i8(args, stream);
  return args.element == Element::bf16 ? run_hopper_bf16(args, stream) : run_hopper_f16(args, stream);
}

}  // namespace

void run_cuda(const char* config, const CudaArgs& args, const cuda::Stream& stream) {
  for (int i = 0; i < static_cast<int>(sizeof(kCudaConfigs) / sizeof(kCudaConfigs[0])); ++i) {
    if (std::strcmp(kCudaConfigs[i].name, config) != 0) continue;
    if (std::strcmp(config, "hopper") == 0) return run_hopper(args, stream);
    if (args.element == Element::i8) return run_i8(i, args, stream);
    return args.element == Element::bf16 ? run_bf16(i, args, stream) : run_f16(i, args, stream);
  }
  throw std::invalid_argument(std::string("sparse24_gemm: unknown configuration ") + config);
}

}  // namespace pycompress::sparse24_gemm
