#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "core/dispatch.h"
#include "core/parallel.h"

namespace py = pybind11;
using namespace pycompress;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of pycompress. Private: tensors are validated in pycompress.ops, not here.";
  m.def("force_isa", &force_isa, py::arg("name"));
  m.def("forced_isa", &forced_isa);
  m.def("isa_available", [] {
    std::vector<std::string> names;
    for (int i = 0; i < static_cast<int>(Isa::kCount); ++i)
      if (isa_available(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
    return names;
  });
  m.def("cpu_vendor", &cpu_vendor);
  m.def("attach_torch", &attach_torch, py::arg("libtorch_cpu_path"));
  m.def("thread_backend", &thread_backend);
  m.def("set_pool_threads", &set_pool_threads, py::arg("n"));
  m.def("num_threads", &num_threads);
  bind_int4_matmul(m);
  bind_int8_conv2d(m);
  bind_int8_matmul(m);
  bind_int8_sparse24(m);
  bind_int8_weight(m);
  bind_kd_loss(m);
  bind_sparse24_gemm(m);
}
