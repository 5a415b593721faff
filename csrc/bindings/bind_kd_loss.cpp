#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "kd_loss/kd_loss.h"

namespace py = pybind11;

namespace pycompress {
namespace {

struct Plan {
  const kd_loss::Kernel* kernel;
  kd_loss::Args args;  // without tensors
};

}  // namespace

void bind_kd_loss(py::module_& m) {
  using namespace kd_loss;
  m.def("kd_loss_kernels", [] { return usable_names(kernels()); });
  // For tests of the error bound: y = 2^x of n floats, x from -127 to 64.
  m.def("kd_loss_exp2", [](const std::string& kernel, uintptr_t x, int64_t n, uintptr_t y) {
    Sweep sweep{};
    sweep.s = address<const float>(x), sweep.n = n, sweep.cs = 1.0f, sweep.x0 = address<float>(y);
    choose("kd_loss", kernels(), kernel).sweep_one(sweep);
  });
  // The options of a call, converted once: 256 rows of 10 classes take 7 us, and every argument costs its share.
  py::class_<Plan>(m, "KdLossPlan")
      .def(py::init([](const std::string& kernel, int form, bool tail, int64_t ignore_index, int divergence, double temperature,
                       double soft_weight, double hard_weight, double beta, double target_weight, double nontarget_weight,
                       double label_smoothing, int reduction) {
        Args a{};
        a.form = static_cast<TeacherForm>(form);
        a.tail = tail;
        a.ignore_index = ignore_index;
        a.divergence = static_cast<Divergence>(divergence);
        a.temperature = temperature;
        a.soft_weight = soft_weight;
        a.hard_weight = hard_weight;
        a.beta = beta;
        a.target_weight = target_weight;
        a.nontarget_weight = nontarget_weight;
        a.label_smoothing = label_smoothing;
        a.reduction = static_cast<Reduction>(reduction);
        return Plan{&choose("kd_loss", kernels(), kernel), a};
      }))
      .def("__call__",
           [](const Plan& plan, int64_t rows, int64_t classes, uintptr_t student, int64_t lds, int student_dtype, uintptr_t teacher,
              int64_t ldt, int64_t teacher_classes, int teacher_dtype, uintptr_t ids, uintptr_t class_map, int64_t common, uintptr_t labels,
              uintptr_t row_weights, double denominator, int64_t batch, uintptr_t loss, uintptr_t gradient, int64_t ldg) {
             Args a = plan.args;
             a.rows = rows, a.classes = classes;
             a.student = address<const void>(student), a.lds = lds, a.student_dtype = static_cast<DType>(student_dtype);
             a.teacher = address<const void>(teacher), a.ldt = ldt, a.teacher_classes = teacher_classes;
             a.teacher_dtype = static_cast<DType>(teacher_dtype);
             a.ids = address<const int64_t>(ids), a.class_map = address<const int64_t>(class_map), a.common = common;
             a.labels = address<const int64_t>(labels), a.row_weights = address<const float>(row_weights);
             a.denominator = denominator, a.batch = batch;
             a.loss = address<float>(loss), a.gradient = address<void>(gradient), a.ldg = ldg;
             py::gil_scoped_release nogil;
             run(*plan.kernel, a);
           });
}

}  // namespace pycompress
