#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "int8_conv2d/int8_conv2d.h"

namespace py = pybind11;

namespace pycompress {

void bind_int8_conv2d(py::module_& m) {
  using namespace int8_conv2d;
  const auto pick = [](const std::string& name) -> const Kernel& { return choose("int8_conv2d", kernels(), name); };
  // n, c, h, w, o, kh, kw, stride, padding and dilation (height, width), groups
  using Sizes = std::array<int64_t, 14>;
  const auto shape = [](const Sizes& v) {
    return Shape{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13]};
  };

  m.def("int8_conv2d_kernels", [] { return usable_names(kernels()); });
  m.def("int8_conv2d_packed_bytes",
        [=](const std::string& kernel, const Sizes& sizes) { return packed_bytes(pick(kernel), shape(sizes)); });
  m.def("int8_conv2d_pack", [=](const std::string& kernel, const Sizes& sizes, uintptr_t weight, uintptr_t packed) {
    const Kernel& k = pick(kernel);
    py::gil_scoped_release nogil;
    pack(k, shape(sizes), address<const int8_t>(weight), address<void>(packed));
  });
  m.def("int8_conv2d_unpack", [=](const std::string& kernel, const Sizes& sizes, uintptr_t packed, uintptr_t weight) {
    const Kernel& k = pick(kernel);
    py::gil_scoped_release nogil;
    unpack(k, shape(sizes), address<const void>(packed), address<int8_t>(weight));
  });
  m.def("int8_conv2d", [=](const std::string& kernel, const std::string& algorithm, const Sizes& sizes, uintptr_t x, int x_type,
                           const std::array<int64_t, 4>& x_stride, bool x_channels_last, uintptr_t packed, uintptr_t scale, uintptr_t bias,
                           bool dynamic, float x_scale, int x_zero_point, int quant_min, int activation, uintptr_t out, int out_type,
                           bool out_channels_last, float out_scale, int out_zero_point, int out_min, uintptr_t residual, int residual_type,
                           float residual_scale, int residual_zero_point) {
    const Kernel& k = pick(kernel);
    const Args args{shape(sizes),
                    address<const void>(x),
                    static_cast<Element>(x_type),
                    {x_stride[0], x_stride[1], x_stride[2], x_stride[3]},
                    x_channels_last,
                    address<const void>(packed),
                    address<const float>(scale),
                    address<const float>(bias),
                    dynamic,
                    x_scale,
                    x_zero_point,
                    quant_min,
                    static_cast<Activation>(activation),
                    address<void>(out),
                    static_cast<Element>(out_type),
                    out_channels_last,
                    out_scale,
                    out_zero_point,
                    out_min,
                    address<const void>(residual),
                    static_cast<Element>(residual_type),
                    residual_scale,
                    residual_zero_point};
    py::gil_scoped_release nogil;
    conv2d(k, args, algorithm.c_str());
  });
  // Name of the algorithm that conv2d picks by itself for a float32 input.
  m.def("int8_conv2d_algorithm",
        [=](const std::string& kernel, const Sizes& sizes, uintptr_t packed, bool dynamic, int x_zero_point, int quant_min) {
          const Kernel& k = pick(kernel);
          Args args{};
          args.shape = shape(sizes), args.packed = address<const void>(packed), args.dynamic = dynamic;
          args.x_zero_point = x_zero_point, args.quant_min = quant_min;
          return std::string(chosen(k, args));
        });
}

}  // namespace pycompress
