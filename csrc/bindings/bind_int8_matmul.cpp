#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "bindings/fast_call.h"
#include "int8_matmul/int8_matmul.h"

namespace py = pybind11;

namespace pycompress {
namespace {

struct LinearPlan {
  static constexpr const char* kName = "int8_linear";
  static constexpr int kInput = 1, kIntegers = 8;  // m, x, ldx, dtype of x and out, packed, scale, bias, out
  const int8_matmul::Kernel& kernel;
  int8_matmul::LinearArgs args;
  int64_t work(const int64_t* integers) const { return integers[0] * args.n * args.k; }
};

void run_linear(const LinearPlan& plan, const int64_t* i) {
  int8_matmul::LinearArgs args = plan.args;
  args.m = i[0];
  args.x = address<const void>(static_cast<uintptr_t>(i[1]));
  args.ldx = i[2];
  args.x_dtype = args.out_dtype = static_cast<DType>(i[3]);
  args.packed = address<const void>(static_cast<uintptr_t>(i[4]));
  args.scale = address<const float>(static_cast<uintptr_t>(i[5]));
  args.bias = address<const float>(static_cast<uintptr_t>(i[6]));
  args.out = address<void>(static_cast<uintptr_t>(i[7]));
  linear(plan.kernel, args);
}

}  // namespace

void bind_int8_matmul(py::module_& m) {
  using namespace int8_matmul;
  const auto pick = [](const std::string& name) -> const Kernel& { return choose("int8_matmul", kernels(), name); };

  m.def("int8_matmul_kernels", [] { return usable_names(kernels()); });
  m.def("int8_matmul_packed_bytes", [=](const std::string& kernel, int64_t n, int64_t k) { return packed_bytes(pick(kernel), n, k); });
  m.def("int8_matmul_pack", [=](const std::string& kernel, uintptr_t b, int64_t ldb, int64_t n, int64_t k, uintptr_t packed) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    pack(kr, address<const int8_t>(b), ldb, n, k, address<void>(packed));
  });
  m.def("int8_matmul_unpack", [=](const std::string& kernel, uintptr_t packed, int64_t n, int64_t k, uintptr_t b) {
    const Kernel& kr = pick(kernel);
    py::gil_scoped_release nogil;
    unpack(kr, address<const void>(packed), n, k, address<int8_t>(b));
  });
  m.def("int8_matmul",
        [=](const std::string& kernel, int64_t M, int64_t N, int64_t K, uintptr_t a, int64_t lda, uintptr_t packed, uintptr_t out) {
          const Kernel& kr = pick(kernel);
          py::gil_scoped_release nogil;
          matmul(kr, M, N, K, address<const int8_t>(a), lda, address<const void>(packed), address<int32_t>(out), N);
        });
  m.def("int8_linear_plan", [=](const std::string& kernel, int64_t N, int64_t K, bool dynamic, bool asymmetric, float x_scale,
                                int x_zero_point, int quant_min, int activation) {
    LinearArgs args{};
    args.n = N, args.k = K;
    args.dynamic = dynamic, args.asymmetric = asymmetric;
    args.x_scale = x_scale, args.x_zero_point = x_zero_point, args.quant_min = quant_min;
    args.activation = static_cast<Activation>(activation);
    return make_plan(new LinearPlan{pick(kernel), args});
  });
  def_fast_call<LinearPlan, run_linear>(m);
}

}  // namespace pycompress
