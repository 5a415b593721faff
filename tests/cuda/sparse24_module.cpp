// The CUDA binding of the 2:4 layers alone, for the emulator.
#include "bind_quantize_rows.h"
#include "bindings/bind_cuda.h"
#include "emulation_controls.h"

PYBIND11_MODULE(_C_sparse24, m) {
  pycompress::bind_sparse24_cuda(m);
  bind_quantize_rows(m);
  bind_emulation_controls(m);
}
