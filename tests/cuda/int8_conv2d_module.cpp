// The CUDA bindings of int8_conv2d alone, for the emulator.
#include "bindings/bind_cuda.h"

extern "C" void emulation_set_order(uint64_t order);

PYBIND11_MODULE(_C_int8_conv2d, m) {
  pycompress::bind_int8_conv2d_cuda(m);
  m.def("set_order", [](uint64_t order) { emulation_set_order(order); });
}
