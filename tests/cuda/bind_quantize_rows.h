// The binding of quantize_rows alone: for emulated modules of ops that quantise, without the int8 products of bind_int8_linear_cuda.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/address.h"
#include "core/cuda/stream.h"
#include "int8_matmul/int8_linear_cuda.h"

inline void bind_quantize_rows(pybind11::module_& m) {
  using pycompress::address;
  m.def("quantize_rows",
        [](int64_t rows, int64_t k, uintptr_t x, int64_t ldx, int dtype, bool dynamic, bool asymmetric, float x_scale, int x_zero_point,
           int quant_min, uintptr_t q, int64_t ldq, uintptr_t row_scale, uintptr_t row_zero, int device, uintptr_t stream) {
          pycompress::int8_matmul::quantize_rows_cuda(
              {rows, k, address<const void>(x), ldx, static_cast<pycompress::DType>(dtype), dynamic, asymmetric, x_scale, x_zero_point,
               quant_min, address<int8_t>(q), ldq, address<float>(row_scale), address<int32_t>(row_zero)},
              {device, address<void>(stream)});
        });
}
