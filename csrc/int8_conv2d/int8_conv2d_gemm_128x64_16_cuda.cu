#include "int8_conv2d/int8_conv2d_gemm.cuh"

namespace pycompress::int8_conv2d {

void conv_cuda_128x64_16(const ConvArgs& args, const cuda::Stream& stream) { launch_conv<Tile<128, 64, 64, 32, 4, 3, 16>>(args, stream); }

}  // namespace pycompress::int8_conv2d
