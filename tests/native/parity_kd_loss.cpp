#include <cmath>
#include <limits>
#include <optional>

#include "core/float_rows.h"
#include "kd_loss/kd_loss.h"
#include "parity.h"

namespace {

using namespace pycompress;
using namespace pycompress::kd_loss;
using parity::Buffer;
using parity::Random;

struct Case {
  int64_t rows, classes;
  Divergence divergence = Divergence::forward;
  TeacherForm form = TeacherForm::logits;
  double temperature = 3, hard = 0.5;
  DType dtype = DType::f32;
  int64_t top_k = 0;  // 0: a value for every class
  bool tail = false;
  int map = 0;  // 0 none, 1 the first classes only, 2 a table with holes
  bool in_place = false;
};

std::string name(const Kernel& kernel, const Case& c) {
  std::string text = std::string("kd_loss ") + kernel.name;
  for (int64_t number : {c.rows, c.classes, static_cast<int64_t>(c.divergence), static_cast<int64_t>(c.form), static_cast<int64_t>(c.dtype),
                         c.top_k, int64_t{c.tail}, int64_t{c.map}, int64_t{c.in_place}})
    text += " " + std::to_string(number);
  return text + " T " + std::to_string(c.temperature);
}

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// `values` as `dtype`, rows `stride` elements apart, not one byte behind the last element.
Buffer<char> narrowed(const Buffer<float>& values, int64_t rows, int64_t cols, int64_t stride, DType dtype) {
  const int64_t size = size_of(dtype);
  Buffer<char> out(rows > 0 ? ((rows - 1) * stride + cols) * size : 0);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = values.data() + r * cols;
    if (dtype == DType::f32)
      std::memcpy(out.data() + r * stride * 4, from, static_cast<size_t>(cols) * 4);
    else
      narrow_row(from, cols, dtype, out.data() + r * stride * size);
  }
  return out;
}

void widened(const Buffer<char>& values, int64_t count, DType dtype, Buffer<float>& out) {
  if (dtype == DType::f32)
    std::memcpy(out.data(), values.data(), values.bytes());
  else
    widen_row(values.data(), dtype, count, out.data());
}

void compare(const Kernel& kernel, const Kernel& scalar, const Case& c) {
  Random random(static_cast<uint64_t>(c.rows * 1009 + c.classes));
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t n = c.rows, teacher_classes = c.top_k ? c.top_k : c.map == 1 ? c.classes + 5 : c.map == 2 ? c.classes + 1 : c.classes;
  Buffer<float> s(n * c.classes), t(n * teacher_classes), weights(n);
  Buffer<int64_t> labels(n), ids(n * c.top_k), map(c.map == 2 ? c.classes : 0);
  for (int64_t i = 0; i < s.size(); ++i) s[i] = random.uniform(-8, 8);
  for (int64_t i = 0; i < t.size(); ++i) {
    t[i] = random.uniform(-8, 8);
    if (c.form == TeacherForm::probabilities) t[i] = random.uniform(0, 1) / static_cast<float>(teacher_classes);
    if (c.form == TeacherForm::log_probabilities && c.top_k)
      t[i] = std::log(random.uniform(0.1f, 0.9f) / static_cast<float>(teacher_classes));
  }
  for (int64_t r = 0; r < n; ++r) {
    labels[r] = r % 5 == 3 ? -100 : random.below(c.classes);
    weights[r] = r % 7 == 6 ? 0.0f : random.uniform(0.5f, 2);
    for (int64_t j = 0; j < c.top_k; ++j) ids[r * c.top_k + j] = (r + j * 3) % c.classes;  // distinct: 3 does not divide the sizes below
    // Padding holds anything; a masked class and a very large logit belong to the language.
    if (r % 5 == 3) s[r * c.classes] = nan, t[r * teacher_classes] = inf;
    if (r % 5 == 1 && c.classes > 2 && c.form == TeacherForm::logits && !c.top_k && !c.map) {
      const int64_t masked = (labels[r] + 1) % c.classes;
      s[r * c.classes + masked] = t[r * teacher_classes + masked] = -inf;
    }
    if (r % 5 == 4) s[r * c.classes + labels[r]] = 1e4f;
  }
  for (int64_t j = 0; j < map.size(); ++j) map[j] = j % 4 == 1 ? -1 : c.classes - j;
  const int64_t lds = c.classes + 3, ldt = teacher_classes + 2, ldg = c.in_place ? lds : c.classes, size = size_of(c.dtype);
  const int64_t gradient_elements = (n - 1) * ldg + c.classes;
  std::optional<Buffer<float>> loss[2], gradient[2];
  for (int side : {0, 1}) {
    Buffer<char> student = narrowed(s, n, c.classes, lds, c.dtype), teacher = narrowed(t, n, teacher_classes, ldt, c.dtype);
    Buffer<char> fresh(c.in_place ? 0 : gradient_elements * size);
    Buffer<char>& out = c.in_place ? student : fresh;
    loss[side].emplace(n);
    Args a{};
    a.rows = n, a.classes = c.classes, a.student = student.data(), a.lds = lds, a.student_dtype = c.dtype;
    a.teacher = teacher.data(), a.ldt = ldt, a.teacher_classes = teacher_classes, a.teacher_dtype = c.dtype, a.form = c.form;
    a.ids = c.top_k ? ids.data() : nullptr, a.tail = c.tail, a.class_map = c.map == 2 ? map.data() : nullptr;
    a.common = c.map == 1 ? c.classes - 1 : c.classes;
    a.labels = labels.data(), a.ignore_index = -100, a.row_weights = weights.data(), a.divergence = c.divergence;
    a.temperature = c.temperature, a.soft_weight = 0.7, a.hard_weight = c.hard, a.beta = 0.3, a.target_weight = 1, a.nontarget_weight = 4;
    a.label_smoothing = 0.1, a.reduction = Reduction::none, a.batch = n;
    a.loss = loss[side]->data(), a.gradient = out.data(), a.ldg = ldg;
    run(side == 0 ? scalar : kernel, a);
    gradient[side].emplace(n * c.classes);
    Buffer<float> wide(gradient_elements);
    widened(out, gradient_elements, c.dtype, wide);
    for (int64_t r = 0; r < n; ++r)
      std::memcpy(gradient[side]->data() + r * c.classes, wide.data() + r * ldg, static_cast<size_t>(c.classes) * 4);
  }
  const double at_loss = parity::difference(loss[1]->data(), loss[0]->data(), n);
  // Softened by T the two are close: D is a small difference of sums near 1, and T^2 (T in the gradient) makes its rounding large.
  parity::expect(at_loss <= 2e-5 + 1e-7 * c.temperature * c.temperature, name(kernel, c) + ", loss off by " + std::to_string(at_loss));
  const double at_gradient = parity::difference(gradient[1]->data(), gradient[0]->data(), n * c.classes);
  const double step = c.dtype == DType::f32 ? 1e-5 + 1e-6 * c.temperature : c.dtype == DType::bf16 ? 1.0 / 128 : 1.0 / 1024;
  parity::expect(at_gradient <= step, name(kernel, c) + ", gradient off by " + std::to_string(at_gradient));
}

// What is out of range is refused before anything is written.
void refused(const Kernel& kernel) {
  const float s[6] = {0, 1, 2, 3, 4, 5};
  for (int64_t label : {int64_t{-1}, int64_t{3}}) {
    const int64_t labels[2] = {0, label};
    float loss[2] = {7, 7}, gradient[6] = {7, 7, 7, 7, 7, 7};
    Args a{};
    a.rows = 2, a.classes = 3, a.student = s, a.lds = 3, a.teacher = s, a.ldt = 3, a.teacher_classes = 3, a.common = 3;
    a.labels = labels, a.ignore_index = -100, a.temperature = 1, a.soft_weight = 1, a.hard_weight = 1, a.batch = 2;
    a.loss = loss, a.gradient = gradient, a.ldg = 3;
    bool thrown = false;
    try {
      run(kernel, a);
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    parity::expect(thrown && loss[0] == 7 && gradient[0] == 7, std::string("kd_loss ") + kernel.name + " takes a label out of range");
  }
}

void run_all() {
  const auto list = parity::usable("kd_loss", kernels());
  const Kernel& scalar = *list.back();
  parity::expect(scalar.isa == Isa::scalar, "the last kernel is not the scalar one");
  const Divergence divergences[] = {Divergence::forward, Divergence::reverse, Divergence::jsd, Divergence::decoupled};
  const TeacherForm forms[] = {TeacherForm::logits, TeacherForm::probabilities, TeacherForm::log_probabilities};
  for (const Kernel* kernel : list) {
    refused(*kernel);
    if (kernel == &scalar) continue;
    const auto check = [&](const Case& c) { parity::fresh([&] { compare(*kernel, scalar, c); }); };
    // Around the borders of vectors, of small rows (48) and of blocks (1024).
    for (int64_t classes : {2, 5, 10, 16, 17, 47, 48, 49, 64, 1000, 1023, 1024, 1025, 2999})
      for (Divergence divergence : divergences)
        for (int64_t rows : {1, 8, 19}) check({rows, classes, divergence});
    for (Divergence divergence : divergences)
      for (TeacherForm form : forms)
        for (int64_t classes : {10, 1100})
          for (double temperature : {0.25, 1.0, 2.0, 3.0, 4.0, 100.0}) {
            if (divergence == Divergence::reverse && form == TeacherForm::probabilities && temperature < 1) continue;  // log of tiny q
            check({17, classes, divergence, form, temperature, 0.5});
            check({5, classes, divergence, form, temperature, 0.0});
          }
    for (DType dtype : {DType::bf16, DType::f16})
      for (Divergence divergence : divergences)
        for (int64_t classes : {10, 50, 1300})
          for (bool in_place : {false, true}) check({19, classes, divergence, TeacherForm::logits, 2, 0.5, dtype, 0, false, 0, in_place});
    for (Divergence divergence : {Divergence::forward, Divergence::reverse, Divergence::jsd}) {
      for (int map : {1, 2})
        for (int64_t classes : {10, 1100}) check({9, classes, divergence, TeacherForm::logits, 2, 0.5, DType::f32, 0, false, map});
      for (TeacherForm form : forms)
        for (int64_t classes : {20, 1100})
          for (int64_t k : {1, 6}) {
            if (divergence == Divergence::reverse) continue;  // infinite: the student is somewhere where the teacher is not
            check({9, classes, divergence, form, 2, 0.5, DType::f32, k, false});
            if (form != TeacherForm::logits) check({9, classes, divergence, form, 2, 0.5, DType::f32, k, true});
          }
    }
  }
}

const parity::Suite suite("kd_loss", run_all);

}  // namespace
