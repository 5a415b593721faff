#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "bindings/geometry.h"
#include "sparse24_gemm/sparse24_gemm.h"

namespace py = pybind11;

namespace pycompress {

void bind_sparse24_gemm(py::module_& m) {
  using namespace sparse24_gemm;
  const auto pick = [](const std::string& name) -> const Kernel& { return choose("sparse24_linear", kernels(), name); };

  m.def("sparse24_linear_kernels", [] { return usable_names(kernels()); });
  m.def("sparse24_packed_bytes",
        [=](const std::string& kernel, int64_t n, int64_t k, int kept) { return packed_bytes(pick(kernel), n, k, kept); });
  m.def("sparse24_pack",
        [=](const std::string& kernel, uintptr_t values, uintptr_t indices, int64_t n, int64_t k, int kept, uintptr_t packed) {
          const Kernel& kr = pick(kernel);
          py::gil_scoped_release nogil;
          pack(kr, address<const float>(values), address<const uint8_t>(indices), n, k, kept, address<void>(packed));
        });
  m.def("sparse24_unpack",
        [=](const std::string& kernel, uintptr_t packed, int64_t n, int64_t k, int kept, uintptr_t values, uintptr_t indices) {
          const Kernel& kr = pick(kernel);
          py::gil_scoped_release nogil;
          unpack(kr, address<const void>(packed), n, k, kept, address<float>(values), address<uint8_t>(indices));
        });
  m.def("sparse24_linear", [=](const std::string& kernel, int64_t M, int64_t N, int64_t K, int kept, uintptr_t x, int64_t ldx, int x_dtype,
                               uintptr_t packed, uintptr_t bias, int activation, uintptr_t out, int out_dtype) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    linear(kr,
           LinearArgs{M, N, K, kept, address<const void>(x), ldx, static_cast<DType>(x_dtype), address<const void>(packed),
                      address<const float>(bias), static_cast<Activation>(activation), address<void>(out), static_cast<DType>(out_dtype)});
  });
  m.def("sparse24_conv2d", [=](const std::string& kernel, int64_t N, int64_t L, int kept, uintptr_t image, const Geometry& geometry,
                               uintptr_t packed, uintptr_t bias, int activation, uintptr_t out) {
    const Kernel& kr = pick(kernel);
    const Unfold input = unfold(image, geometry);
    py::gil_scoped_release nogil;
    convolve(kr, ConvArgs{N, L, kept, input, address<const void>(packed), address<const float>(bias), static_cast<Activation>(activation),
                          address<float>(out)});
  });
}

}  // namespace pycompress
