// The CUDA binding of the 2:4 layers alone, for the emulator.
#include "bind_quantize_rows.h"
#include "bindings/bind_cuda.h"

extern "C" void emulation_set_order(uint64_t order);

PYBIND11_MODULE(_C_sparse24, m) {
  pycompress::bind_sparse24_cuda(m);
  bind_quantize_rows(m);
  m.def("set_order", [](uint64_t order) { emulation_set_order(order); });
}
