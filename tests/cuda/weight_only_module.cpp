// The CUDA bindings of the weight-only layers alone, for the emulator.
#include "bind_quantize_rows.h"
#include "bindings/bind_cuda.h"

extern "C" void emulation_set_order(uint64_t order);

PYBIND11_MODULE(_C_weight_only, m) {
  pycompress::bind_weight_only_cuda(m);
  bind_quantize_rows(m);
  m.def("set_order", [](uint64_t order) { emulation_set_order(order); });
}
