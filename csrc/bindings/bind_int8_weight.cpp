#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "int8_weight/int8_weight.h"

namespace py = pybind11;

namespace pycompress {

void bind_int8_weight(py::module_& m) {
  using namespace int8_weight;
  m.def("int8_weight_linear_kernels", [] { return usable_names(kernels()); });
  m.def("int8_weight_linear", [](const std::string& kernel, int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t ldx, int dtype,
                                 uintptr_t weight, uintptr_t scale, uintptr_t bias, uintptr_t out) {
    const Kernel& kr = choose("int8_weight_linear", kernels(), kernel);
    py::gil_scoped_release nogil;
    linear(kr, LinearArgs{M, N, K, address<const void>(x), ldx, static_cast<DType>(dtype), address<const int8_t>(weight),
                          address<const float>(scale), address<const float>(bias), address<void>(out)});
  });
}

}  // namespace pycompress
