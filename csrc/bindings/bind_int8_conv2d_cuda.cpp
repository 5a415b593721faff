#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "bindings/address.h"
#include "bindings/bind_cuda.h"
#include "core/cuda/stream.h"
#include "int8_conv2d/int8_conv2d_cuda.h"

namespace py = pybind11;

namespace pycompress {

void bind_int8_conv2d_cuda(py::module_& m) {
  using namespace int8_conv2d;

  // name -> (output pixels, output channels, bytes copied at a time)
  m.def("int8_conv2d_configs", [] {
    py::dict configs;
    for (const ConvConfig& config : kConvConfigs) configs[config.name] = py::make_tuple(config.bm, config.bn, config.unit);
    return configs;
  });
  m.attr("int8_conv2d_max_partials") = kMaxPartials;
  m.def("int8_conv2d_quantize",
        [](int64_t n, int64_t c, int64_t pixels, uintptr_t x, int x_type, int64_t image_stride, bool channels_last, int64_t sets,
           int64_t channels, int64_t padded, bool dynamic, float x_scale, int x_zero_point, int quant_min, uintptr_t partial,
           int64_t partials, uintptr_t image_scale, uintptr_t q, int device, uintptr_t stream) {
          quantize_images_cuda(QuantizeImagesArgs{n, c, pixels, address<const void>(x), static_cast<Element>(x_type), image_stride,
                                                  channels_last, sets, channels, padded, dynamic, x_scale, x_zero_point, quant_min,
                                                  address<uint32_t>(partial), partials, address<float>(image_scale), address<int8_t>(q)},
                               cuda::Stream{device, address<void>(stream)});
        });
  // `shape`: the fields of Shape, then the size of the output. `strides`: of q, in bytes: image, row, pixel. `name`: a configuration or
  // "depthwise".
  m.def("int8_conv2d_cuda",
        [](const std::string& name, const std::array<int64_t, 16>& s, uintptr_t q, const std::array<int64_t, 3>& strides, int64_t sets,
           int64_t padded, uintptr_t weight, int64_t depth, float x_scale, uintptr_t image_scale, int zero_point, uintptr_t weight_sum,
           uintptr_t scale, uintptr_t bias, int activation, uintptr_t out, int out_type, bool channels_last, float out_scale,
           int out_zero_point, int out_min, uintptr_t residual, int residual_type, float residual_scale, int residual_zero_point,
           int64_t splits, uintptr_t partial, int device, uintptr_t stream) {
          const ConvArgs args{{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13]},
                              s[14],
                              s[15],
                              address<const int8_t>(q),
                              strides[0],
                              strides[1],
                              strides[2],
                              sets,
                              padded,
                              address<const int8_t>(weight),
                              depth,
                              {x_scale, address<const float>(image_scale), zero_point, address<const int32_t>(weight_sum),
                               address<const float>(scale), address<const float>(bias), static_cast<Activation>(activation),
                               address<void>(out), static_cast<Element>(out_type), channels_last, out_scale, out_zero_point, out_min,
                               address<const void>(residual), static_cast<Element>(residual_type), residual_scale, residual_zero_point},
                              splits,
                              address<int32_t>(partial)};
          const cuda::Stream on{device, address<void>(stream)};
          if (name == "depthwise") return conv_cuda_depthwise(args, on);
          for (const ConvConfig& config : kConvConfigs)
            if (name == config.name) return config.run(args, on);
          throw std::invalid_argument("int8_conv2d: unknown configuration " + name);
        });
}

}  // namespace pycompress
