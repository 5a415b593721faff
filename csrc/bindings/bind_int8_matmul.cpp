#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "int8_matmul/int8_matmul.h"

namespace py = pybind11;

namespace pycompress {

void bind_int8_matmul(py::module_& m) {
  using namespace int8_matmul;
  const auto pick = [](const std::string& name) -> const Kernel& { return choose("int8_matmul", kernels(), name); };

  m.def("int8_matmul_kernels", [] { return usable_names(kernels()); });
  m.def("int8_matmul_packed_bytes", [=](const std::string& kernel, int64_t n, int64_t k) { return packed_bytes(pick(kernel), n, k); });
  m.def("int8_matmul_pack", [=](const std::string& kernel, uintptr_t b, int64_t ldb, int64_t n, int64_t k, uintptr_t packed) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    pack(kr, address<const int8_t>(b), ldb, n, k, address<void>(packed));
  });
  m.def("int8_matmul_unpack", [=](const std::string& kernel, uintptr_t packed, int64_t n, int64_t k, uintptr_t b) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    unpack(kr, address<const void>(packed), n, k, address<int8_t>(b));
  });
  m.def("int8_matmul",
        [=](const std::string& kernel, int64_t M, int64_t N, int64_t K, uintptr_t a, int64_t lda, uintptr_t packed, uintptr_t out) {
          const Kernel& kr = pick(kernel);
          py::gil_scoped_release nogil;
          matmul(kr, M, N, K, address<const int8_t>(a), lda, address<const void>(packed), address<int32_t>(out), N);
        });
  m.def("int8_linear", [=](const std::string& kernel, int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t ldx, int x_dtype,
                           uintptr_t packed, uintptr_t scale, uintptr_t bias, bool dynamic, bool asymmetric, float x_scale,
                           int x_zero_point, int quant_min, int activation, uintptr_t out, int out_dtype) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    linear(kr, LinearArgs{M, N, K, address<const void>(x), ldx, static_cast<DType>(x_dtype), address<const void>(packed),
                          address<const float>(scale), address<const float>(bias), dynamic, asymmetric, x_scale, x_zero_point, quant_min,
                          static_cast<Activation>(activation), address<void>(out), static_cast<DType>(out_dtype)});
  });
}

}  // namespace pycompress
