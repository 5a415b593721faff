#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings/address.h"
#include "bindings/bind_cuda.h"
#include "core/cuda/stream.h"
#include "weight_only/weight_only_cuda.h"

namespace py = pybind11;

namespace pycompress {

void bind_weight_only_cuda(py::module_& m) {
  using namespace weight_only;

  // name -> (rows, columns) of a block
  m.def("weight_few_configs", [] {
    py::dict configs;
    for (const FewConfig& config : kFewConfigs) configs[config.name] = py::make_tuple(config.rows, config.columns);
    return configs;
  });
  // group_size 0: int8
  m.def("weight_few", [](const std::string& name, int64_t m, int64_t n, int64_t k, uintptr_t x, int64_t ldx, int dtype, uintptr_t data,
                         int64_t ldw, uintptr_t scale, uintptr_t zero, int64_t ldn, int group_size, uintptr_t bias, int activation,
                         uintptr_t out, int device, uintptr_t stream) {
    const Weight weight{n,   k,         address<const uint8_t>(data), ldw, address<const float>(scale), address<const uint8_t>(zero),
                        ldn, group_size};
    const FewArgs args{weight,
                       m,
                       address<const void>(x),
                       ldx,
                       static_cast<DType>(dtype),
                       address<const float>(bias),
                       static_cast<Activation>(activation),
                       address<void>(out)};
    for (const FewConfig& config : kFewConfigs)
      if (name == config.name)
        return (group_size == 0 ? int8_few_cuda : int4_few_cuda)(config, args, cuda::Stream{device, address<void>(stream)});
    throw std::invalid_argument("weight_few: unknown configuration " + name);
  });
  // int4 weights, int8 activations: name -> (rows, columns) of a block
  m.def("int4_int8_configs", [] {
    py::dict configs;
    for (const Int8ActConfig& config : kInt8ActConfigs) configs[config.name] = py::make_tuple(config.rows, config.columns);
    return configs;
  });
  m.def("int4_int8", [](const std::string& name, int64_t m, int64_t n, int64_t k, uintptr_t q, int64_t ldq, uintptr_t row_scale,
                        uintptr_t data, int64_t ldw, uintptr_t scale, uintptr_t zero, int64_t ldn, int group_size, uintptr_t bias,
                        int activation, uintptr_t out, int dtype, int device, uintptr_t stream) {
    const Weight weight{n,   k,         address<const uint8_t>(data), ldw, address<const float>(scale), address<const uint8_t>(zero),
                        ldn, group_size};
    const Int8ActArgs args{weight,
                           m,
                           address<const int8_t>(q),
                           ldq,
                           address<const float>(row_scale),
                           address<const float>(bias),
                           static_cast<Activation>(activation),
                           address<void>(out),
                           static_cast<DType>(dtype)};
    for (const Int8ActConfig& config : kInt8ActConfigs)
      if (name == config.name) return config.run(args, cuda::Stream{device, address<void>(stream)});
    throw std::invalid_argument("int4_int8: unknown configuration " + name);
  });
  m.def("weight_dequantize", [](int64_t n, int64_t k, uintptr_t data, int64_t ldw, uintptr_t scale, uintptr_t zero, int64_t ldn,
                                int group_size, int dtype, uintptr_t out, int64_t ldo, int device, uintptr_t stream) {
    dequantize_cuda(
        Weight{n, k, address<const uint8_t>(data), ldw, address<const float>(scale), address<const uint8_t>(zero), ldn, group_size},
        static_cast<DType>(dtype), address<void>(out), ldo, cuda::Stream{device, address<void>(stream)});
  });
}

}  // namespace pycompress
