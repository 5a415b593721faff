// The CUDA binding of the 2:4 layers alone, for the emulator.
#include "bindings/address.h"
#include "bindings/bind_cuda.h"
#include "core/cuda/stream.h"
#include "int8_matmul/int8_linear_cuda.h"

using pycompress::address;

extern "C" void emulation_set_order(uint64_t order);

PYBIND11_MODULE(_C_sparse24, m) {
  pycompress::bind_sparse24_cuda(m);
  m.def("quantize_rows",
        [](int64_t rows, int64_t k, uintptr_t x, int64_t ldx, int dtype, bool dynamic, bool asymmetric, float x_scale, int x_zero_point,
           int quant_min, uintptr_t q, int64_t ldq, uintptr_t row_scale, uintptr_t row_zero, int device, uintptr_t stream) {
          pycompress::int8_matmul::quantize_rows_cuda(
              {rows, k, address<const void>(x), ldx, static_cast<pycompress::DType>(dtype), dynamic, asymmetric, x_scale, x_zero_point,
               quant_min, address<int8_t>(q), ldq, address<float>(row_scale), address<int32_t>(row_zero)},
              {device, address<void>(stream)});
        });
  m.def("set_order", [](uint64_t order) { emulation_set_order(order); });
}
