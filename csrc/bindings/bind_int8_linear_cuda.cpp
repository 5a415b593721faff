#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings/address.h"
#include "bindings/bind_cuda.h"
#include "core/cuda/stream.h"
#include "int8_matmul/int8_linear_cuda.h"

namespace py = pybind11;

namespace pycompress {

void bind_int8_linear_cuda(py::module_& m) {
  using namespace int8_matmul;

  // name -> (rows, columns) of the tile
  m.def("int8_gemm_configs", [] {
    py::dict configs;
    for (const GemmConfig& config : kGemmConfigs) configs[config.name] = py::make_tuple(config.bm, config.bn);
    return configs;
  });
  m.def("quantize_rows",
        [](int64_t m, int64_t k, uintptr_t x, int64_t ldx, int dtype, bool dynamic, bool asymmetric, float x_scale, int x_zero_point,
           int quant_min, uintptr_t q, int64_t ldq, uintptr_t row_scale, uintptr_t row_zero, int device, uintptr_t stream) {
          quantize_rows_cuda(
              QuantizeRowsArgs{m, k, address<const void>(x), ldx, static_cast<DType>(dtype), dynamic, asymmetric, x_scale, x_zero_point,
                               quant_min, address<int8_t>(q), ldq, address<float>(row_scale), address<int32_t>(row_zero)},
              cuda::Stream{device, address<void>(stream)});
        });
  m.def("int8_gemm", [](const std::string& name, int64_t m, int64_t n, int64_t k, uintptr_t a, int64_t lda, uintptr_t b, int64_t ldb,
                        uintptr_t row_scale, uintptr_t row_zero, uintptr_t col_scale, uintptr_t column_sum, uintptr_t bias, int activation,
                        uintptr_t out, int out_type, int device, uintptr_t stream) {
    for (const GemmConfig& config : kGemmConfigs)
      if (name == config.name)
        return config.run(
            GemmArgs{m, n, k, address<const int8_t>(a), address<const int8_t>(b), lda, ldb, address<const float>(row_scale),
                     address<const int32_t>(row_zero), address<const float>(col_scale), address<const int32_t>(column_sum),
                     address<const float>(bias), static_cast<Activation>(activation), address<void>(out), static_cast<GemmOut>(out_type)},
            cuda::Stream{device, address<void>(stream)});
    throw std::invalid_argument("int8_gemm: unknown configuration " + name);
  });
}

}  // namespace pycompress
