#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "int4_matmul/int4_matmul.h"

namespace py = pybind11;

namespace pycompress {

void bind_int4_matmul(py::module_& m) {
  using namespace int4_matmul;
  const auto pick = [](const std::string& name) -> const Kernel& { return choose("int4_matmul", kernels(), name); };

  m.def("int4_matmul_kernels", [] { return usable_names(kernels()); });
  m.def("int4_matmul_packed_bytes", [=](const std::string& kernel, int64_t n, int64_t k, int64_t group, bool asymmetric) {
    return packed_bytes(pick(kernel), n, k, group, asymmetric);
  });
  m.def("int4_matmul_pack", [=](const std::string& kernel, uintptr_t weight, uintptr_t scale, uintptr_t zero, int64_t n, int64_t k,
                                int64_t group, uintptr_t packed) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    pack(kr, address<const uint8_t>(weight), address<const float>(scale), address<const uint8_t>(zero), n, k, group, address<void>(packed));
  });
  m.def("int4_matmul_unpack", [=](const std::string& kernel, uintptr_t packed, int64_t n, int64_t k, int64_t group, uintptr_t weight,
                                  uintptr_t scale, uintptr_t zero) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    unpack(kr, address<const void>(packed), n, k, group, address<uint8_t>(weight), address<float>(scale), address<uint8_t>(zero));
  });
  m.def("int4_linear",
        [=](const std::string& kernel, int64_t M, int64_t N, int64_t K, int64_t group, uintptr_t x, int64_t ldx, int x_dtype,
            uintptr_t packed, bool asymmetric, uintptr_t bias, bool int8_activations, int activation, uintptr_t out, int out_dtype) {
          const Kernel& kr = pick(kernel);
          py::gil_scoped_release nogil;
          linear(kr, LinearArgs{M, N, K, group, address<const void>(x), ldx, static_cast<DType>(x_dtype), address<const void>(packed),
                                asymmetric, address<const float>(bias), int8_activations, static_cast<Activation>(activation),
                                address<void>(out), static_cast<DType>(out_dtype)});
        });
}

}  // namespace pycompress
