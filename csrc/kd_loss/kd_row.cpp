#include "kd_loss/kd_row.h"

#include <algorithm>
#include <cmath>

#include "core/float_rows.h"
#include "core/scratch.h"
#include "kd_loss/kd_formulas.h"

namespace pycompress::kd_loss {
namespace {

constexpr float kSumLimit = 0x1p64f;  // a block whose sums pass this was started from too low a reference point

bool is_reference(float x) { return x > kNoReference && x < kInfinity; }

float element(const void* row, DType dtype, int64_t j) {
  if (dtype == DType::f32) return static_cast<const float*>(row)[j];
  const uint16_t h = static_cast<const uint16_t*>(row)[j];
  return dtype == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

const void* advance(const void* p, DType dtype, int64_t elements) { return static_cast<const char*>(p) + elements * element_size(dtype); }

}  // namespace

RowSolver::RowSolver(const Kernel& kernel, const Args& args, double factor)
    : kernel_(kernel),
      args_(args),
      factor_(factor),
      cs_(static_cast<float>(kLog2e / args.temperature)),
      ct_(args.form == TeacherForm::logits              ? cs_
          : args.form == TeacherForm::log_probabilities ? kLog2e
                                                        : 1.0f),
      power_(static_cast<float>(args.temperature)) {
  has_soft_ = args.teacher != nullptr;
  has_hard_ = args.hard_weight > 0.0;
  top_k_ = args.ids != nullptr;
  if (args.class_map)
    for (int64_t j = 0; j < args.common; ++j) map_holes_ = map_holes_ || args.class_map[j] < 0;
  const bool own = top_k_ || map_holes_;
  shared_ = has_soft_ && has_hard_ && args.temperature == 1.0 && !map_holes_;
  separate_ = has_hard_ && own && !shared_;
  hard_ = !has_hard_ || shared_     ? Hard::none
          : own                     ? Hard::own
          : args.temperature == 2.0 ? Hard::square
          : args.temperature == 3.0 ? Hard::cube
          : args.temperature == 4.0 ? Hard::fourth
                                    : Hard::own;
  keep_ = args.gradient != nullptr || (has_soft_ && !top_k_ && args.divergence == Divergence::jsd);
  in_row_ = args.gradient != nullptr && args.gradient != args.student && args.student_dtype == DType::f32;
  const int64_t row = round_up(args.classes, 16), kept = keep_ ? row : kBlock;
  static thread_local Scratch memory;  // stays: a large allocation per call would be page faults per call
  float* m = memory.get<float>(static_cast<size_t>(3 * kept + (top_k_ ? row : 0) + 3 * kBlock));
  x0_ = m, x1_ = m + kept, x2_ = m + 2 * kept, m += 3 * kept;
  buffer_s_ = m, buffer_h_ = m + kBlock, buffer_t_ = m + 2 * kBlock, copy_ = m + 3 * kBlock;
  for (int64_t begin = 0; begin < args.classes;) {
    const bool soft = begin < args.common;
    const int64_t n = std::min(kBlock, (soft ? args.common : args.classes) - begin);
    blocks_.push_back({begin, n, soft, 0, 0, 0, 0, 0, 0, 0});
    begin += n;
  }
}

double RowSolver::student_at(int64_t j) const { return element(student_, args_.student_dtype, j); }

// log2 of the teacher's weight for a class, before normalisation.
double RowSolver::teacher_log2_at(int64_t j) const {
  const float t = element(teacher_, args_.teacher_dtype, j);
  if (args_.form == TeacherForm::probabilities) return t < 0x1p-126f ? (t >= 0.0f ? -kInfinity : kNaN) : std::log2(static_cast<double>(t));
  return static_cast<double>(ct_) * t;
}

void RowSolver::open(int64_t row) {
  const Args& a = args_;
  student_ = advance(a.student, a.student_dtype, row * a.lds);
  teacher_ = has_soft_ ? advance(a.teacher, a.teacher_dtype, row * a.ldt) : nullptr;
  ids_ = top_k_ ? a.ids + row * a.teacher_classes : nullptr;
  gradient_ = a.gradient ? const_cast<void*>(advance(a.gradient, a.student_dtype, row * a.ldg)) : nullptr;
  if (in_row_) x0_ = static_cast<float*>(gradient_);
  label_ = a.labels ? a.labels[row] : -1;
  reference_s_ = reference_t_ = reference_1_ = kHole;
  logit_sum_ = 0.0;
  label_gradient_ = 0.0;
  total_s_ = total_t_ = total_1_ = Total{};
  if (top_k_) {
    student_block(0, a.classes, copy_, true);
    if (has_hard_ && a.label_smoothing > 0.0)
      for (const Block& b : blocks_) logit_sum_ += kernel_.sum(copy_ + b.begin, b.n);
    for (int64_t i = 0; i < a.teacher_classes; ++i) copy_[ids_[i]] = kHole;
  }
}

// Student logits as float32: in place where they are that already, else in `buffer`.
const float* RowSolver::student_block(int64_t begin, int64_t n, float* buffer, bool copy) const {
  const void* p = advance(student_, args_.student_dtype, begin);
  if (args_.student_dtype != DType::f32)
    kernel_.widen(p, args_.student_dtype, n, buffer);
  else if (copy)
    std::copy_n(static_cast<const float*>(p), n, buffer);
  else
    return static_cast<const float*>(p);
  return buffer;
}

void RowSolver::load_teacher(const Block& b) {
  const Args& a = args_;
  const bool hole = a.divergence == Divergence::decoupled && label_ >= b.begin && label_ < b.begin + b.n;
  if (a.class_map) {
    for (int64_t j = 0; j < b.n; ++j) {
      const int64_t from = a.class_map[b.begin + j];
      buffer_t_[j] = from < 0 ? 1.0f : element(teacher_, a.teacher_dtype, from);
    }
  } else {
    const void* p = advance(teacher_, a.teacher_dtype, b.begin);
    if (a.teacher_dtype != DType::f32) {
      kernel_.widen(p, a.teacher_dtype, b.n, buffer_t_);
    } else if (hole || a.form == TeacherForm::probabilities) {
      std::copy_n(static_cast<const float*>(p), b.n, buffer_t_);
    } else {
      t_ = static_cast<const float*>(p);
      return;
    }
  }
  t_ = buffer_t_;
  if (a.form == TeacherForm::probabilities) kernel_.log2(buffer_t_, b.n);
  if (hole) buffer_t_[label_ - b.begin] = kHole;
  if (map_holes_)
    for (int64_t j = 0; j < b.n; ++j)
      if (a.class_map[b.begin + j] < 0) buffer_t_[j] = kHole;
}

// Points s_, plain_ and t_ at the data of a block.
void RowSolver::load(const Block& b) {
  const Args& a = args_;
  if (top_k_) {
    plain_ = s_ = copy_ + b.begin;
    return;
  }
  plain_ = s_ = student_block(b.begin, b.n, buffer_s_, false);
  if (!b.soft) return;
  load_teacher(b);
  const bool hole = a.divergence == Divergence::decoupled && label_ >= b.begin && label_ < b.begin + b.n;
  if (!hole && !map_holes_) return;
  std::copy_n(plain_, b.n, buffer_h_);
  if (hole) buffer_h_[label_ - b.begin] = kHole;
  if (map_holes_)
    for (int64_t j = 0; j < b.n; ++j)
      if (a.class_map[b.begin + j] < 0) buffer_h_[j] = kHole;
  s_ = buffer_h_;
}

namespace {

// A value of the block to measure exponents from: any that is not far below the block's largest will do.
void find_reference(const Kernel& kernel, const float* x, int64_t n, float* reference) {
  if (is_reference(*reference)) return;
  *reference = std::max(std::max(x[0], x[n / 2]), x[n - 1]);
  if (!is_reference(*reference)) *reference = kernel.max(x, n);
}

bool raise_reference(const Kernel& kernel, const float* x, int64_t n, float* reference) {
  const float top = kernel.max(x, n);
  if (!is_reference(top) || !(top > *reference)) return false;
  *reference = top;
  return true;
}

float exponent(float c, float reference) { return is_reference(reference) ? c * reference : 0.0f; }

}  // namespace

void RowSolver::sweep_soft(Block& b) {
  find_reference(kernel_, s_, b.n, &reference_s_);
  find_reference(kernel_, t_, b.n, &reference_t_);
  const Soft soft = args_.divergence == Divergence::jsd       ? Soft::plain
                    : args_.divergence == Divergence::reverse ? Soft::reverse
                                                              : Soft::forward;
  const Hard hard = separate_ ? Hard::none : hard_;
  const int64_t at = keep_ ? b.begin : 0;
  Sweep w{s_, t_, b.n, cs_, 0, ct_, 0, c1_, 0, x0_ + at, x1_ + at, x2_ + at, 0, 0, 0, 0};
  for (;;) {
    w.ds = exponent(cs_, reference_s_);
    w.dt = exponent(ct_, reference_t_);
    w.d1 = hard >= Hard::square ? power_ * w.ds : exponent(c1_, reference_s_);
    kernel_.sweep[static_cast<int>(soft) * static_cast<int>(Hard::kCount) + static_cast<int>(hard)][careful_](w);
    if (w.sum_s < kSumLimit && w.sum_t < kSumLimit && w.sum_1 < kSumLimit) {
      if (std::isfinite(w.cross) || careful_) break;
      careful_ = true;  // minus infinity in the logits; it will be there in the next row too
      continue;
    }
    const bool raised_s = raise_reference(kernel_, s_, b.n, &reference_s_), raised_t = raise_reference(kernel_, t_, b.n, &reference_t_);
    if (!raised_s && !raised_t) break;  // NaN or infinite
  }
  b.ds = w.ds, b.dt = w.dt, b.d1 = w.d1;
  b.sum_s = w.sum_s, b.sum_t = w.sum_t, b.sum_1 = w.sum_1, b.cross = w.cross;
}

// Exponentials of one array.
void RowSolver::sweep_single(const float* x, int64_t n, float c, float* reference, float* d, float* sum, float* out) {
  find_reference(kernel_, x, n, reference);
  Sweep w{x, nullptr, n, c, 0, 0, 0, 0, 0, out, nullptr, nullptr, 0, 0, 0, 0};
  do {
    w.ds = exponent(c, *reference);
    kernel_.sweep_one(w);
  } while (!(w.sum_s < kSumLimit) && raise_reference(kernel_, x, n, reference));
  *d = w.ds, *sum = w.sum_s;
}

void RowSolver::sweep(Block& b) {
  const int64_t at = keep_ ? b.begin : 0;
  load(b);
  if (has_hard_ && args_.label_smoothing > 0.0 && !top_k_) logit_sum_ += kernel_.sum(plain_, b.n);
  if (!b.soft) {
    b.sum_s = b.sum_t = b.sum_1 = b.cross = 0.0f;
    if (has_hard_) sweep_single(plain_, b.n, c1_, &reference_1_, &b.d1, &b.sum_1, x0_ + at);
    return;
  }
  // The separate sweep comes first: x0 may overwrite the student's own row.
  float separate_d = 0.0f, separate_sum = 0.0f;
  if (separate_) sweep_single(plain_, b.n, c1_, &reference_1_, &separate_d, &separate_sum, x2_ + at);
  if (top_k_) {
    b.sum_t = b.cross = 0.0f;
    sweep_single(s_, b.n, cs_, &reference_s_, &b.ds, &b.sum_s, x0_ + at);
  } else {
    sweep_soft(b);
  }
  if (separate_) b.d1 = separate_d, b.sum_1 = separate_sum;
  if (shared_) b.d1 = b.ds, b.sum_1 = b.sum_s;
}

// KL(p || q) in bits.
double RowSolver::forward_bits() const {
  const double shift = std::log2(total_s_.sum / total_t_.sum) + (total_s_.base - total_t_.base);
  double bits = 0.0;
  for (const Block& b : blocks_)
    if (b.soft && b.sum_t != 0.0f) bits += total_t_.factor(b.dt) * (b.cross + b.sum_t * (static_cast<double>(b.dt) - b.ds + shift));
  return bits;
}

// KL(q || p) in bits.
double RowSolver::reverse_bits() const {
  const double shift = std::log2(total_t_.sum / total_s_.sum) + (total_t_.base - total_s_.base);
  double bits = 0.0;
  for (const Block& b : blocks_)
    if (b.soft && b.sum_s != 0.0f) bits += total_s_.factor(b.ds) * (b.cross + b.sum_s * (static_cast<double>(b.ds) - b.dt + shift));
  return bits;
}

// Jensen-Shannon divergence in bits; x1 becomes q log2(q / m).
double RowSolver::mix(double* q_bits) {
  const double shift = std::log2(total_s_.sum / total_t_.sum) + (total_s_.base - total_t_.base);
  double p_bits = 0.0;
  *q_bits = 0.0;
  for (const Block& b : blocks_) {
    if (!b.soft) continue;
    load(b);
    Mix m{s_,
          t_,
          b.n,
          cs_,
          b.ds,
          ct_,
          b.dt,
          x0_ + b.begin,
          x1_ + b.begin,
          static_cast<float>(total_s_.factor(b.ds)),
          static_cast<float>(total_t_.factor(b.dt)),
          static_cast<float>(static_cast<double>(b.dt) - b.ds + shift),
          static_cast<float>(args_.beta),
          0,
          0};
    kernel_.mix(m);
    p_bits += m.sum_p;
    *q_bits += m.sum_q;
  }
  return args_.beta * p_bits + (1.0 - args_.beta) * *q_bits;
}

// Decoupled divergence in bits. The sweep left the label out, so the totals are those of the other classes.
double RowSolver::decouple(SoftGradient* g) {
  const double rest = forward_bits();
  const double rest_s = total_s_.log(), rest_t = total_t_.log();
  const double label_s = static_cast<double>(cs_) * student_at(label_), label_t = teacher_log2_at(label_);
  const Decoupled d = kd_loss::decouple(rest, rest_s, rest_t, label_s, label_t, args_.target_weight, args_.nontarget_weight);
  g->scale_s = d.scale_s;
  g->scale_t = d.scale_t;
  label_gradient_ = d.label_gradient;
  return d.bits;
}

// Top-k teacher, in bits: the divergence over k classes and one bucket for all others. The sweep left the k classes out.
double RowSolver::bucketed(SoftGradient* g) {
  const Args& a = args_;
  const int64_t k = a.teacher_classes;
  log_p_.resize(static_cast<size_t>(k + 1));
  log_q_.resize(static_cast<size_t>(k + 1));
  id_gradient_.resize(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) {
    log_p_[i] = teacher_log2_at(i);
    log_q_[i] = static_cast<double>(cs_) * student_at(ids_[i]);
  }
  log_q_[k] = total_s_.empty ? -kInfinity : total_s_.log();
  log_p_[k] = -kInfinity;
  if (a.tail) {
    double kept = 0.0;
    for (int64_t i = 0; i < k; ++i) kept += std::exp2(log_p_[i]);
    log_p_[k] = kept < 1.0 ? std::log2(1.0 - kept) : (kept == kept ? -kInfinity : kept);
  }
  for (std::vector<double>* logs : {&log_p_, &log_q_}) {
    double top = -kInfinity, sum = 0.0;
    for (const double x : *logs) top = x > top ? x : top;
    for (const double x : *logs) sum += std::exp2(x - top);
    const double log_sum = top + std::log2(sum);
    for (double& x : *logs) x -= log_sum;
  }
  Bits bits;
  for (int64_t i = 0; i <= k; ++i) add_bits(a.divergence, a.beta, log_p_[i], log_q_[i], &bits);
  const double mean = bits.mean(a.divergence, a.beta);
  const auto gradient = [&](int64_t i) { return bucket_gradient(a.divergence, a.beta, log_p_[i], log_q_[i], mean); };
  for (int64_t i = 0; i < k; ++i) id_gradient_[i] = gradient(i);
  // The other classes share the bucket's gradient in proportion to the exponentials that the sweep kept.
  g->scale_s = total_s_.empty ? 0.0 : gradient(k);
  return bits.total(a.divergence, a.beta);
}

double RowSolver::solve(int64_t row, double weight) {
  const Args& a = args_;
  open(row);
  for (Block& b : blocks_) {
    sweep(b);
    if (b.soft) {
      total_s_.add(b.sum_s, b.ds);
      total_t_.add(b.sum_t, b.dt);
    }
    total_1_.add(b.sum_1, b.d1);
  }
  double loss = 0.0;
  SoftGradient g;
  if (has_soft_) {
    double bits = 0.0;
    if (top_k_) {
      bits = bucketed(&g);
    } else if (a.divergence == Divergence::forward) {
      bits = forward_bits();
      g.scale_s = g.scale_t = 1.0;
    } else if (a.divergence == Divergence::reverse) {
      bits = reverse_bits();
      g.scale_w = kLn2;
      g.scale_s = -kLn2 * bits;
    } else if (a.divergence == Divergence::jsd) {
      double q_bits;
      bits = mix(&q_bits);
      g.scale_w = kLn2 * (1.0 - a.beta);
      g.scale_s = -kLn2 * (1.0 - a.beta) * q_bits;
    } else {
      bits = decouple(&g);
    }
    loss = a.soft_weight * a.temperature * a.temperature * kLn2 * bits;
  }
  if (has_hard_) {
    if (a.divergence == Divergence::decoupled && has_soft_) total_1_.add(1.0, c1_ * student_at(label_));
    if (top_k_) {
      for (int64_t i = 0; i < a.teacher_classes; ++i) total_1_.add(1.0, c1_ * student_at(ids_[i]));
    }
    const double log_1 = total_1_.log();
    double entropy = log_1 - c1_ * student_at(label_);
    if (a.label_smoothing > 0.0) {
      const double uniform = log_1 - c1_ * logit_sum_ / static_cast<double>(a.classes);
      entropy = (1.0 - a.label_smoothing) * entropy + a.label_smoothing * uniform;
    }
    loss += a.hard_weight * kLn2 * entropy;
  }
  if (gradient_) write_gradient(g, weight * factor_);
  return loss;
}

void RowSolver::write_gradient(const SoftGradient& g, double scale) {
  const Args& a = args_;
  const double soft = a.soft_weight * a.temperature * scale, hard = a.hard_weight * scale;
  const bool pair = has_soft_ && !top_k_, crossed = g.scale_w != 0.0;
  const double k = has_hard_ ? -hard * a.label_smoothing / static_cast<double>(a.classes) : 0.0;
  const double shift_reverse =
      a.divergence == Divergence::reverse && pair ? std::log2(total_t_.sum / total_s_.sum) + (total_t_.base - total_s_.base) : 0.0;
  const bool decoupled = has_soft_ && a.divergence == Divergence::decoupled;
  // Classes that the sweep left out. Before the combination, because that may overwrite the student.
  const double log_1 = has_hard_ ? total_1_.log() : 0.0;
  if (decoupled) label_gradient_ = soft * label_gradient_ + k + (has_hard_ ? hard * std::exp2(c1_ * student_at(label_) - log_1) : 0.0);
  if (top_k_)
    for (int64_t i = 0; i < a.teacher_classes; ++i)
      id_gradient_[i] = soft * id_gradient_[i] + k + (has_hard_ ? hard * std::exp2(c1_ * student_at(ids_[i]) - log_1) : 0.0);
  float* out = in_row_ || a.student_dtype != DType::f32 ? x0_ : static_cast<float*>(gradient_);
  for (const Block& b : blocks_) {
    Combine c{x0_ + b.begin, x1_ + b.begin, x2_ + b.begin, b.n, 0, 0, 0, static_cast<float>(k), out + b.begin};
    if (!b.soft) {
      c.a = has_hard_ ? static_cast<float>(hard * total_1_.factor(b.d1)) : 0.0f;
      if (has_hard_)
        kernel_.combine[0](c);
      else
        std::fill_n(c.out, b.n, 0.0f);
      continue;
    }
    const double to_q = b.sum_s == 0.0f ? 0.0 : total_s_.factor(b.ds), to_p = b.sum_t == 0.0f ? 0.0 : total_t_.factor(b.dt);
    double x0 = soft * g.scale_s * to_q;
    double x1 = soft * g.scale_t * to_p;
    if (crossed && a.divergence == Divergence::reverse) {
      x0 += soft * g.scale_w * to_q * (static_cast<double>(b.ds) - b.dt + shift_reverse);
      x1 = -soft * g.scale_w * to_q;
    } else if (crossed) {
      x1 = -soft * g.scale_w;
    }
    const double x2 = has_hard_ && b.sum_1 != 0.0f ? hard * total_1_.factor(b.d1) : 0.0;
    if (shared_) x0 += x2;
    c.a = static_cast<float>(x0), c.b = static_cast<float>(x1), c.c = static_cast<float>(x2);
    kernel_.combine[(pair ? static_cast<int>(Hard::kCount) : 0) + static_cast<int>(hard_)](c);
  }
  if (decoupled) out[label_] = static_cast<float>(label_gradient_);
  if (top_k_)
    for (int64_t i = 0; i < a.teacher_classes; ++i) out[ids_[i]] = static_cast<float>(id_gradient_[i]);
  if (has_hard_) out[label_] -= static_cast<float>(hard * (1.0 - a.label_smoothing));
  if (a.student_dtype != DType::f32) kernel_.narrow(out, a.classes, a.student_dtype, gradient_);
}

}  // namespace pycompress::kd_loss
