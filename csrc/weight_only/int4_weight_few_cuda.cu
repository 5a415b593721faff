#include "weight_only/few.cuh"

namespace pycompress::weight_only {

void int4_few_cuda(const FewConfig& config, const FewArgs& args, const cuda::Stream& stream) {
  run_few<Int4>("int4_linear", config, args, stream);
}

}  // namespace pycompress::weight_only
