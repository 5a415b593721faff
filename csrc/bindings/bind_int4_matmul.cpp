#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "bindings/fast_call.h"
#include "int4_matmul/int4_matmul.h"

namespace py = pybind11;

namespace pycompress {
namespace {

struct LinearPlan {
  static constexpr const char* kName = "int4_linear";
  static constexpr int kInput = 1, kIntegers = 7;  // m, x, ldx, dtype of x and out, packed, bias, out
  const int4_matmul::Kernel& kernel;
  int4_matmul::LinearArgs args;
  int64_t work(const int64_t* integers) const { return integers[0] * args.n * args.k; }
};

void run_linear(const LinearPlan& plan, const int64_t* i) {
  int4_matmul::LinearArgs args = plan.args;
  args.m = i[0];
  args.x = address<const void>(static_cast<uintptr_t>(i[1]));
  args.ldx = i[2];
  args.x_dtype = args.out_dtype = static_cast<DType>(i[3]);
  args.packed = address<const void>(static_cast<uintptr_t>(i[4]));
  args.bias = address<const float>(static_cast<uintptr_t>(i[5]));
  args.out = address<void>(static_cast<uintptr_t>(i[6]));
  linear(plan.kernel, args);
}

}  // namespace

void bind_int4_matmul(py::module_& m) {
  using namespace int4_matmul;
  const auto pick = [](const std::string& name) -> const Kernel& { return choose("int4_matmul", kernels(), name); };

  m.def("int4_matmul_kernels", [] { return usable_names(kernels()); });
  m.def("int4_matmul_packed_bytes", [=](const std::string& kernel, int64_t n, int64_t k, int64_t group, bool asymmetric) {
    return packed_bytes(pick(kernel), n, k, group, asymmetric);
  });
  m.def("int4_matmul_pack", [=](const std::string& kernel, uintptr_t weight, uintptr_t scale, uintptr_t zero, int64_t n, int64_t k,
                                int64_t group, uintptr_t packed) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    pack(kr, address<const uint8_t>(weight), address<const float>(scale), address<const uint8_t>(zero), n, k, group, address<void>(packed));
  });
  m.def("int4_matmul_unpack", [=](const std::string& kernel, uintptr_t packed, int64_t n, int64_t k, int64_t group, uintptr_t weight,
                                  uintptr_t scale, uintptr_t zero) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    unpack(kr, address<const void>(packed), n, k, group, address<uint8_t>(weight), address<float>(scale), address<uint8_t>(zero));
  });
  m.def("int4_linear_plan",
        [=](const std::string& kernel, int64_t N, int64_t K, int64_t group, bool asymmetric, bool int8_activations, int activation) {
          LinearArgs args{};
          args.n = N, args.k = K, args.group = group;
          args.asymmetric = asymmetric, args.int8_activations = int8_activations;
          args.activation = static_cast<Activation>(activation);
          return make_plan(new LinearPlan{pick(kernel), args});
        });
  def_fast_call<LinearPlan, run_linear>(m);
}

}  // namespace pycompress
