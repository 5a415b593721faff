// The CUDA binding of kd_loss alone, for the emulator.
#include "bindings/bind_cuda.h"

extern "C" void emulation_set_order(uint64_t order);

PYBIND11_MODULE(_C_kd_loss, m) {
  pycompress::bind_kd_loss_cuda(m);
  m.def("set_order", [](uint64_t order) { emulation_set_order(order); });
}
