#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "bindings/bind_cuda.h"

namespace py = pybind11;
using namespace pycompress;

PYBIND11_MODULE(_C_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of pycompress. Private: tensors are validated in pycompress.ops.cuda, not here.";
  // CUDA versions as 1000 * major + 10 * minor: of the driver (0: none) and of the runtime that is linked in.
  m.def("driver_version", [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  });
  m.attr("runtime_version") = CUDART_VERSION;
  bind_int8_conv2d_cuda(m);
  bind_int8_linear_cuda(m);
  bind_kd_loss_cuda(m);
  bind_sparse24_cuda(m);
  bind_weight_only_cuda(m);
}
