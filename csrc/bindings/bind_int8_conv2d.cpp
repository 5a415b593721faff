#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "bindings/fast_call.h"
#include "int8_conv2d/int8_conv2d.h"

namespace py = pybind11;

namespace pycompress {
namespace {

struct ConvPlan {
  static constexpr const char* kName = "int8_conv2d";
  static constexpr int kInput = 3, kIntegers = 13;  // n, h, w, x, its four strides, packed, scale, bias, residual, out
  const int8_conv2d::Kernel& kernel;
  std::string algorithm;
  int8_conv2d::Args args;
  int64_t work(const int64_t* i) const {
    const int8_conv2d::Shape& s = args.shape;
    return i[0] * i[1] * i[2] * s.o * s.c / s.groups * s.taps() / (s.stride_h * s.stride_w);
  }
};

void run_conv(const ConvPlan& plan, const int64_t* i) {
  int8_conv2d::Args args = plan.args;
  args.shape.n = i[0], args.shape.h = i[1], args.shape.w = i[2];
  args.x = address<const void>(static_cast<uintptr_t>(i[3]));
  std::copy(i + 4, i + 8, args.x_stride);
  args.packed = address<const void>(static_cast<uintptr_t>(i[8]));
  args.scale = address<const float>(static_cast<uintptr_t>(i[9]));
  args.bias = address<const float>(static_cast<uintptr_t>(i[10]));
  args.residual = address<const void>(static_cast<uintptr_t>(i[11]));
  args.out = address<void>(static_cast<uintptr_t>(i[12]));
  conv2d(plan.kernel, args, plan.algorithm.c_str());
}

}  // namespace

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
  // Sizes with any n, h and w: calls give their own.
  m.def("int8_conv2d_plan",
        [=](const std::string& kernel, const std::string& algorithm, const Sizes& sizes, int x_type, bool x_channels_last, bool dynamic,
            float x_scale, int x_zero_point, int quant_min, int activation, int out_type, bool out_channels_last, float out_scale,
            int out_zero_point, int out_min, int residual_type, float residual_scale, int residual_zero_point) {
          Args args{};
          args.shape = shape(sizes);
          args.x_type = static_cast<Element>(x_type), args.x_channels_last = x_channels_last;
          args.dynamic = dynamic;
          args.x_scale = x_scale, args.x_zero_point = x_zero_point, args.quant_min = quant_min;
          args.activation = static_cast<Activation>(activation);
          args.out_type = static_cast<Element>(out_type), args.out_channels_last = out_channels_last;
          args.out_scale = out_scale, args.out_zero_point = out_zero_point, args.out_min = out_min;
          args.residual_type = static_cast<Element>(residual_type);
          args.residual_scale = residual_scale, args.residual_zero_point = residual_zero_point;
          return make_plan(new ConvPlan{pick(kernel), algorithm, args});
        });
  def_fast_call<ConvPlan, run_conv>(m);
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
