#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind_cuda.h"
#include "sparse24_gemm/sparse24_cuda.h"

namespace py = pybind11;

namespace pycompress {

void bind_sparse24_cuda(py::module_& m) {
  using namespace sparse24_gemm;
  // name -> (channels, tokens) of a block
  m.def("sparse24_configs", [] {
    py::dict configs;
    for (const CudaConfig& config : kCudaConfigs) configs[config.name] = py::make_tuple(config.bn, config.bm);
    return configs;
  });
  m.def("sparse24_gemm", [](const std::string& config, int64_t m, int64_t n, int64_t n_padded, int64_t steps, uintptr_t x, int64_t ldx,
                            int64_t x_bytes, int element, uintptr_t values, uintptr_t meta, uintptr_t row_scale, uintptr_t col_scale,
                            uintptr_t bias, int activation, uintptr_t out, int out_dtype, int device, uintptr_t stream) {
    run_cuda(
        config.c_str(),
        CudaArgs{m, n, n_padded, steps, address<const void>(x), ldx, x_bytes, static_cast<Element>(element), address<const void>(values),
                 address<const uint32_t>(meta), address<const float>(row_scale), address<const float>(col_scale),
                 address<const float>(bias), static_cast<Activation>(activation), address<void>(out), static_cast<DType>(out_dtype)},
        cuda::Stream{device, address<void>(stream)});
  });
  m.def("sparse24_float_few", [](int64_t m, int64_t n, int64_t k, int64_t chunks, int per_group, uintptr_t values, uintptr_t indices,
                                 uintptr_t x, int64_t ldx, uintptr_t bias, int activation, uintptr_t out, int device, uintptr_t stream) {
    float_few_cuda(FloatArgs{{n, k, chunks, per_group, address<const float>(values), address<const uint8_t>(indices)},
                             m,
                             address<const float>(x),
                             ldx,
                             address<const float>(bias),
                             static_cast<Activation>(activation),
                             address<float>(out)},
                   cuda::Stream{device, address<void>(stream)});
  });
  m.def("sparse24_float_dense", [](int64_t n, int64_t k, int64_t chunks, int per_group, uintptr_t values, uintptr_t indices, uintptr_t out,
                                   int64_t ldo, int device, uintptr_t stream) {
    float_dense_cuda(FloatWeight{n, k, chunks, per_group, address<const float>(values), address<const uint8_t>(indices)},
                     address<float>(out), ldo, cuda::Stream{device, address<void>(stream)});
  });
}

}  // namespace pycompress
