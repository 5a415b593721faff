#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "kd_loss/kd_loss.h"

namespace py = pybind11;

namespace pycompress {

void bind_kd_loss(py::module_& m) {
  using namespace kd_loss;
  m.def("kd_loss_kernels", [] { return usable_names(kernels()); });
  // For tests of the error bound: y = 2^x of n floats, x from -127 to 64.
  m.def("kd_loss_exp2", [](const std::string& kernel, uintptr_t x, int64_t n, uintptr_t y) {
    Sweep sweep{};
    sweep.s = address<const float>(x), sweep.n = n, sweep.cs = 1.0f, sweep.x0 = address<float>(y);
    choose("kd_loss", kernels(), kernel).sweep_one(sweep);
  });
  m.def("kd_loss",
        [](const std::string& kernel, int64_t rows, int64_t classes, uintptr_t student, int64_t lds, int student_dtype, uintptr_t teacher,
           int64_t ldt, int64_t teacher_classes, int teacher_dtype, int form, uintptr_t ids, bool tail, uintptr_t class_map, int64_t common,
           uintptr_t labels, int64_t ignore_index, uintptr_t row_weights, int divergence, double temperature, double soft_weight,
           double hard_weight, double beta, double target_weight, double nontarget_weight, double label_smoothing, int reduction,
           double denominator, int64_t batch, uintptr_t loss, uintptr_t gradient, int64_t ldg) {
          const Kernel& k = choose("kd_loss", kernels(), kernel);
          const Args args{rows,
                          classes,
                          address<const void>(student),
                          lds,
                          static_cast<DType>(student_dtype),
                          address<const void>(teacher),
                          ldt,
                          teacher_classes,
                          static_cast<DType>(teacher_dtype),
                          static_cast<TeacherForm>(form),
                          address<const int64_t>(ids),
                          tail,
                          address<const int64_t>(class_map),
                          common,
                          address<const int64_t>(labels),
                          ignore_index,
                          address<const float>(row_weights),
                          static_cast<Divergence>(divergence),
                          temperature,
                          soft_weight,
                          hard_weight,
                          beta,
                          target_weight,
                          nontarget_weight,
                          label_smoothing,
                          static_cast<Reduction>(reduction),
                          denominator,
                          batch,
                          address<float>(loss),
                          address<void>(gradient),
                          ldg};
          py::gil_scoped_release nogil;
          run(k, args);
        });
}

}  // namespace pycompress
