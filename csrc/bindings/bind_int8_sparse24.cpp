#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "bindings/geometry.h"
#include "int8_sparse24/int8_sparse24.h"

namespace py = pybind11;

namespace pycompress {

void bind_int8_sparse24(py::module_& m) {
  using namespace int8_sparse24;
  const auto pick = [](const std::string& name) -> const Kernel& { return choose("int8_sparse24_linear", kernels(), name); };

  m.def("int8_sparse24_linear_kernels", [] { return usable_names(kernels()); });
  m.def("int8_sparse24_packed_bytes",
        [=](const std::string& kernel, int64_t n, int64_t k, int kept) { return packed_bytes(pick(kernel), n, k, kept); });
  m.def("int8_sparse24_pack",
        [=](const std::string& kernel, uintptr_t values, uintptr_t indices, int64_t n, int64_t k, int kept, uintptr_t packed) {
          const Kernel& kr = pick(kernel);
          py::gil_scoped_release nogil;
          pack(kr, address<const int8_t>(values), address<const uint8_t>(indices), n, k, kept, address<void>(packed));
        });
  m.def("int8_sparse24_unpack",
        [=](const std::string& kernel, uintptr_t packed, int64_t n, int64_t k, int kept, uintptr_t values, uintptr_t indices) {
          const Kernel& kr = pick(kernel);
          py::gil_scoped_release nogil;
          unpack(kr, address<const void>(packed), n, k, kept, address<int8_t>(values), address<uint8_t>(indices));
        });
  m.def("int8_sparse24_linear",
        [=](const std::string& kernel, int64_t M, int64_t N, int64_t K, int kept, uintptr_t x, int64_t ldx, int x_dtype, uintptr_t packed,
            uintptr_t scale, uintptr_t bias, bool dynamic, float x_scale, int activation, uintptr_t out, int out_dtype) {
          const Kernel& kr = pick(kernel);
          py::gil_scoped_release nogil;
          linear(kr, LinearArgs{M, N, K, kept, address<const void>(x), ldx, static_cast<DType>(x_dtype), address<const void>(packed),
                                address<const float>(scale), address<const float>(bias), dynamic, x_scale,
                                static_cast<Activation>(activation), address<void>(out), static_cast<DType>(out_dtype)});
        });
  m.def("int8_sparse24_conv2d",
        [=](const std::string& kernel, int64_t M, int64_t N, int kept, uintptr_t image, const Geometry& geometry, uintptr_t packed,
            uintptr_t scale, uintptr_t bias, float x_scale, int activation, uintptr_t out, int out_dtype, bool planes) {
          const Kernel& kr = pick(kernel);
          const Unfold input = unfold(image, geometry);
          py::gil_scoped_release nogil;
          linear(kr, LinearArgs{M, N, input.depth(), kept, nullptr, 0, DType::f32, address<const void>(packed), address<const float>(scale),
                                address<const float>(bias), false, x_scale, static_cast<Activation>(activation), address<void>(out),
                                static_cast<DType>(out_dtype), input, planes});
        });
}

}  // namespace pycompress
