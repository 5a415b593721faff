#include "weight_only/few.cuh"

namespace pycompress::weight_only {

void int8_few_cuda(const FewConfig& config, const FewArgs& args, const cuda::Stream& stream) {
  run_few<Int8>("int8_weight_linear", config, args, stream);
}

}  // namespace pycompress::weight_only
