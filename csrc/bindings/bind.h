// One bind function per op; module.cpp calls them.
#pragma once
#include <pybind11/pybind11.h>

namespace pycompress {

void bind_int4_matmul(pybind11::module_& m);
void bind_int8_conv2d(pybind11::module_& m);
void bind_int8_matmul(pybind11::module_& m);
void bind_int8_sparse24(pybind11::module_& m);
void bind_int8_weight(pybind11::module_& m);
void bind_kd_loss(pybind11::module_& m);
void bind_sparse24_gemm(pybind11::module_& m);

}  // namespace pycompress
