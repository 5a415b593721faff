// One bind function per op with CUDA kernels; module_cuda.cpp calls them.
#pragma once
#include <pybind11/pybind11.h>

namespace pycompress {

void bind_int8_conv2d_cuda(pybind11::module_& m);
void bind_int8_linear_cuda(pybind11::module_& m);
void bind_kd_loss_cuda(pybind11::module_& m);
void bind_sparse24_cuda(pybind11::module_& m);
void bind_weight_only_cuda(pybind11::module_& m);

}  // namespace pycompress
