#include "kd_loss/kd_loss.h"

#include <algorithm>
#include <string>
#include <vector>

#include "core/float_rows.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "kd_loss/kd_row.h"

#if PC_X86
#include <xmmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pycompress::kd_loss {

extern const Kernel kScalar;
#if PC_X86
extern const Kernel kAvx2, kAvx512;
#elif PC_ARM64
extern const Kernel kNeon;
#endif

const KernelList<Kernel>& kernels() {
  static const KernelList<Kernel> list = {
#if PC_X86
      &kAvx512, &kAvx2,
#elif PC_ARM64
      &kNeon,
#endif
      &kScalar};
  return list;
}

namespace {

constexpr int64_t kSerial = 1 << 14;              // elements below which a second thread costs more than it brings
constexpr int64_t kHugeFrom = int64_t{32} << 20;  // bytes; glibc maps anything larger anew on every allocation

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("kd_loss: " + what); }

// Exponentials far below a row's largest become 0 instead of denormals, which some CPUs compute a hundred times slower.
class FlushDenormals {
 public:
#if PC_X86
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

// A fresh gradient of 65 MB is 16000 page faults, which take longer than computing it.
void advise_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t from = reinterpret_cast<uintptr_t>(begin), first = (from + kPage - 1) & ~(kPage - 1),
                  last = (from + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (bytes > kHugeFrom && last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

// Rows that count: not ignored, and not of weight 0.
bool counts(const Args& a, int64_t row) {
  return !(a.labels && a.labels[row] == a.ignore_index) && !(a.row_weights && a.row_weights[row] == 0.0f);
}

double row_weight(const Args& a, int64_t row) { return a.row_weights ? a.row_weights[row] : 1.0; }

char* gradient_row(const Args& a, int64_t row) {
  return static_cast<char*>(a.gradient) + row * a.ldg * (a.student_dtype == DType::f32 ? 4 : 2);
}

void clear_row(const Args& a, int64_t row) {
  if (a.gradient) std::fill_n(gradient_row(a, row), a.classes * (a.student_dtype == DType::f32 ? 4 : 2), char{0});
}

void general_rows(const Kernel& kernel, const Args& a, double factor, int64_t begin, int64_t end, float* loss) {
  RowSolver solver(kernel, a, factor);
  for (int64_t r = begin; r < end; ++r) {
    if (counts(a, r)) {
      const double weight = row_weight(a, r);
      loss[r] = static_cast<float>(weight * solver.solve(r, weight));
    } else {
      clear_row(a, r);
      loss[r] = 0.0f;
    }
  }
}

bool is_small(const Args& a) {
  return a.classes <= kSmall && a.common == (a.teacher ? a.classes : 0) && !a.ids && !a.class_map && a.form == TeacherForm::logits &&
         !(a.teacher && a.divergence == Divergence::decoupled);
}

void spread(const void* row, DType dtype, int64_t classes, int lanes, float* to) {
  if (dtype == DType::f32) {
    const float* x = static_cast<const float*>(row);
    for (int64_t j = 0; j < classes; ++j) to[j * lanes] = x[j];
  } else {
    float x[kSmall];
    widen_row(row, dtype, classes, x);
    for (int64_t j = 0; j < classes; ++j) to[j * lanes] = x[j];
  }
}

void small_rows(const Kernel& kernel, const Args& a, double factor, int64_t begin, int64_t end, float* loss) {
  const int lanes = kernel.lanes;
  const int64_t plane = a.classes * lanes, step_s = a.lds, step_t = a.ldt;
  static thread_local Scratch memory;
  float* m = memory.get<float>(static_cast<size_t>(5 * plane + 3 * lanes));
  float *s = m, *t = m + plane, *label_logit = m + 5 * plane, *scale = label_logit + lanes, *tile_loss = scale + lanes;
  const double temperature = a.temperature, soft = a.soft_weight * temperature;
  const int kind = !a.teacher ? 0 : a.divergence == Divergence::forward ? 1 : a.divergence == Divergence::reverse ? 2 : 3;
  const bool hard = a.hard_weight > 0.0;
  const float c = static_cast<float>(kLog2e / temperature);
  Tile tile{s,
            t,
            m + 2 * plane,
            m + 3 * plane,
            m + 4 * plane,
            a.classes,
            c,
            c,
            static_cast<float>(soft * temperature * 0.69314718055994530942),
            static_cast<float>(a.hard_weight),
            static_cast<float>(a.label_smoothing),
            static_cast<float>(a.beta),
            static_cast<float>(kind == 3 ? soft * (1.0 - a.beta) : soft),
            a.gradient != nullptr,
            label_logit,
            scale,
            tile_loss};
  for (int64_t first = begin; first < end; first += lanes) {
    const int64_t n = std::min<int64_t>(lanes, end - first);
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t r = first + i;
      const bool used = i < n && counts(a, r);
      label_logit[i] = scale[i] = 0.0f;
      if (!used) {
        for (int64_t j = 0; j < a.classes; ++j) s[j * lanes + i] = t[j * lanes + i] = 0.0f;
        continue;
      }
      const size_t bytes_s = a.student_dtype == DType::f32 ? 4 : 2, bytes_t = a.teacher_dtype == DType::f32 ? 4 : 2;
      spread(static_cast<const char*>(a.student) + r * step_s * bytes_s, a.student_dtype, a.classes, lanes, s + i);
      if (a.teacher) spread(static_cast<const char*>(a.teacher) + r * step_t * bytes_t, a.teacher_dtype, a.classes, lanes, t + i);
      if (hard) label_logit[i] = s[a.labels[r] * lanes + i];
      scale[i] = static_cast<float>(row_weight(a, r) * factor);
    }
    kernel.tile[kind][hard](tile);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = first + i;
      if (!counts(a, r)) {
        clear_row(a, r);
        loss[r] = 0.0f;
        continue;
      }
      loss[r] = static_cast<float>(row_weight(a, r) * tile_loss[i]);
      if (!a.gradient) continue;
      float* g = tile.x0 + i;
      if (hard) g[a.labels[r] * lanes] -= scale[i] * static_cast<float>(a.hard_weight * (1.0 - a.label_smoothing));
      float line[kSmall];
      float* out = a.student_dtype == DType::f32 ? reinterpret_cast<float*>(gradient_row(a, r)) : line;
      for (int64_t j = 0; j < a.classes; ++j) out[j] = g[j * lanes];
      if (out == line) narrow_row(line, a.classes, a.student_dtype, gradient_row(a, r));
    }
  }
}

}  // namespace

double check(const Args& a) {
  double total = 0.0;
  for (int64_t r = 0; r < a.rows; ++r) {
    if (a.labels) {
      const int64_t label = a.labels[r];
      if (label != a.ignore_index && (label < 0 || label >= a.classes))
        fail("labels must lie in 0.." + std::to_string(a.classes - 1) + " or be ignore_index (" + std::to_string(a.ignore_index) +
             "), got " + std::to_string(label));
    }
    if (a.row_weights && !(a.row_weights[r] >= 0.0f))
      fail("row_weights must not be negative or NaN, got " + std::to_string(a.row_weights[r]));
    if (counts(a, r)) total += row_weight(a, r);
  }
  if (a.ids) {
    std::vector<int64_t> seen(static_cast<size_t>(a.classes), -1);
    for (int64_t r = 0; r < a.rows; ++r)
      for (int64_t i = 0; i < a.teacher_classes; ++i) {
        const int64_t id = a.ids[r * a.teacher_classes + i];
        if (id < 0 || id >= a.classes) fail("teacher_ids must lie in 0.." + std::to_string(a.classes - 1) + ", got " + std::to_string(id));
        if (seen[static_cast<size_t>(id)] == r) fail("teacher_ids must differ within a row, got " + std::to_string(id) + " twice");
        seen[static_cast<size_t>(id)] = r;
      }
  }
  if (a.class_map) {
    bool any = false;
    for (int64_t j = 0; j < a.classes; ++j) {
      const int64_t to = a.class_map[j];
      if (to < -1 || to >= a.teacher_classes)
        fail("class_map must lie in -1.." + std::to_string(a.teacher_classes - 1) + ", got " + std::to_string(to));
      any = any || to >= 0;
    }
    if (!any) fail("class_map must map at least one class, got -1 for all");
  }
  return total;
}

void run(const Kernel& kernel, const Args& a) {
  const double counted = check(a);
  double denominator = a.denominator;
  if (denominator == 0.0)
    denominator = a.reduction == Reduction::mean        ? (counted > 0.0 ? counted : 1.0)
                  : a.reduction == Reduction::batchmean ? static_cast<double>(a.batch)
                                                        : 1.0;
  const double factor = 1.0 / denominator;
  if (a.gradient && a.gradient != a.student) advise_huge_pages(a.gradient, a.rows * a.ldg * (a.student_dtype == DType::f32 ? 4 : 2));
  std::vector<float> own(a.reduction == Reduction::none ? 0 : static_cast<size_t>(a.rows));
  float* loss = a.reduction == Reduction::none ? a.loss : own.data();
  const bool small = is_small(a);
  const auto rows = [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    (small ? small_rows : general_rows)(kernel, a, factor, begin, end, loss);
  };
  if (a.rows * a.classes < kSerial)
    rows(0, a.rows);
  else
    parallel_for(a.rows, rows);
  if (a.reduction == Reduction::none) return;
  double sum = 0.0;
  for (int64_t r = 0; r < a.rows; ++r) sum += own[static_cast<size_t>(r)];
  a.loss[0] = static_cast<float>(sum * factor);
}

}  // namespace pycompress::kd_loss
