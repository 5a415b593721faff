// The CUDA binding of kd_loss alone, for the emulator.
#include "bindings/bind_cuda.h"
#include "emulation_controls.h"

PYBIND11_MODULE(_C_kd_loss, m) {
  pycompress::bind_kd_loss_cuda(m);
  bind_emulation_controls(m);
}
