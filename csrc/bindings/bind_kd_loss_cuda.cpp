#include <pybind11/pybind11.h>

#include "bindings/address.h"
#include "bindings/bind_cuda.h"
#include "kd_loss/kd_loss_cuda.h"

namespace py = pybind11;

namespace pycompress {
namespace {

struct Plan {
  kd_loss::Args args;  // without tensors
};

}  // namespace

void bind_kd_loss_cuda(py::module_& m) {
  using namespace kd_loss;
  m.attr("kd_loss_max_threads") = kCudaMaxThreads;
  m.def("kd_loss_shared_bytes",
        [](int64_t classes, int student_dtype, int teacher_dtype, bool teacher, int64_t ids, int cluster, bool on_chip) {
          Args a{};
          a.classes = classes, a.student_dtype = static_cast<DType>(student_dtype), a.teacher_dtype = static_cast<DType>(teacher_dtype);
          static const int64_t some = 0;  // only whether there are any matters
          a.teacher = teacher ? &some : nullptr, a.ids = ids ? &some : nullptr, a.teacher_classes = ids;
          return cuda_shared_bytes(a, cluster, on_chip);
        });
  m.def("kd_loss_scale", [](int64_t rows, int64_t classes, int64_t ldg, uintptr_t gradient, int dtype, uintptr_t upstream, bool per_row,
                            int device, uintptr_t stream) {
    scale_cuda({rows, classes, ldg, address<void>(gradient), static_cast<DType>(dtype), address<const float>(upstream), per_row, device,
                address<void>(stream)});
  });
  py::class_<Plan>(m, "KdLossCudaPlan")
      .def(
          py::init([](int form, bool tail, int64_t ignore_index, int divergence, double temperature, double soft_weight, double hard_weight,
                      double beta, double target_weight, double nontarget_weight, double label_smoothing, int reduction) {
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
            return Plan{a};
          }))
      .def("__call__",
           [](const Plan& plan, int64_t rows, int64_t classes, uintptr_t student, int64_t lds, int student_dtype, uintptr_t teacher,
              int64_t ldt, int64_t teacher_classes, int teacher_dtype, uintptr_t ids, uintptr_t class_map, int64_t common, uintptr_t labels,
              uintptr_t row_weights, int64_t batch, uintptr_t row_loss, uintptr_t loss, uintptr_t scale, bool scale_given,
              uintptr_t gradient, int64_t ldg, int threads, int cluster, bool on_chip, int device, uintptr_t stream) {
             CudaCall call{};
             Args& a = call.args;
             a = plan.args;
             a.rows = rows, a.classes = classes;
             a.student = address<const void>(student), a.lds = lds, a.student_dtype = static_cast<DType>(student_dtype);
             a.teacher = address<const void>(teacher), a.ldt = ldt, a.teacher_classes = teacher_classes;
             a.teacher_dtype = static_cast<DType>(teacher_dtype);
             a.ids = address<const int64_t>(ids), a.class_map = address<const int64_t>(class_map), a.common = common;
             a.labels = address<const int64_t>(labels), a.row_weights = address<const float>(row_weights);
             a.batch = batch, a.loss = address<float>(loss), a.gradient = address<void>(gradient), a.ldg = ldg;
             call.row_loss = address<float>(row_loss), call.scale = address<float>(scale), call.scale_given = scale_given;
             call.threads = threads, call.cluster = cluster, call.on_chip = on_chip;
             call.device = device, call.stream = address<void>(stream);
             run_cuda(call);
           });
}

}  // namespace pycompress
