// The CUDA bindings of the weight-only layers alone, for the emulator.
#include "bind_quantize_rows.h"
#include "bindings/bind_cuda.h"
#include "emulation_controls.h"

PYBIND11_MODULE(_C_weight_only, m) {
  pycompress::bind_weight_only_cuda(m);
  bind_quantize_rows(m);
  bind_emulation_controls(m);
}
