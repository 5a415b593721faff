// The CUDA bindings of int8_linear alone, for the emulator.
#include "bindings/bind_cuda.h"
#include "emulation_controls.h"

PYBIND11_MODULE(_C_int8, m) {
  pycompress::bind_int8_linear_cuda(m);
  bind_emulation_controls(m);
}
