// The CUDA bindings of int8_conv2d alone, for the emulator.
#include "bindings/bind_cuda.h"
#include "emulation_controls.h"

PYBIND11_MODULE(_C_int8_conv2d, m) {
  pycompress::bind_int8_conv2d_cuda(m);
  bind_emulation_controls(m);
}
