#include "int8_conv2d/int8_conv2d_gemm.cuh"

namespace pycompress::int8_conv2d {

void conv_cuda_64x64_16(const ConvArgs& args, const cuda::Stream& stream) { launch_conv<Tile<64, 64, 32, 32, 4, 4, 16>>(args, stream); }

}  // namespace pycompress::int8_conv2d
