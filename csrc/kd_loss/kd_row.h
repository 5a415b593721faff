// One row of kd_loss: its blocks, how they merge, and the coefficients of its gradient. Private to kd_loss.cpp.
#pragma once
#include <cmath>
#include <vector>

#include "kd_loss/kd_loss.h"

namespace pycompress::kd_loss {

// A sum of exponentials over blocks with different reference points: sum * 2^base.
struct Total {
  double base = 0.0, sum = 0.0;
  bool empty = true;

  void add(double block_sum, double d) {  // block_sum * 2^d
    if (block_sum == 0.0) return;
    if (empty || d == base)
      sum += block_sum;
    else if (d > base)
      sum = sum * std::exp2(base - d) + block_sum;
    else
      sum += block_sum * std::exp2(d - base);
    base = empty || d > base ? d : base;
    empty = false;
  }
  double log() const { return std::log2(sum) + base; }
  // Exponentials of a block with reference point d, times this, are probabilities.
  double factor(double d) const { return (d == base ? 1.0 : std::exp2(d < base ? d - base : 0.0)) / sum; }
};

class RowSolver {
 public:
  // `factor` scales the gradient of every row: 1 / denominator of the reduction.
  RowSolver(const Kernel& kernel, const Args& args, double factor);

  // Writes the row's gradient and returns its loss, without its weight. `weight` is above 0.
  double solve(int64_t row, double weight);

 private:
  struct Block {
    int64_t begin, n;
    bool soft;  // false: beyond the common classes, cross-entropy only
    float ds, dt, d1, sum_s, sum_t, sum_1, cross;
  };
  // What the gradient of the soft term is made of: scale_s * q - scale_t * p + scale_w * (x1 of reverse and jsd).
  struct SoftGradient {
    double scale_s = 0.0, scale_t = 0.0, scale_w = 0.0;
  };

  void open(int64_t row);
  const float* student_block(int64_t begin, int64_t n, float* buffer, bool copy) const;
  void load(const Block& b);
  void load_teacher(const Block& b);
  void sweep(Block& b);
  void sweep_soft(Block& b);
  void sweep_single(const float* x, int64_t n, float c, float* reference, float* d, float* sum, float* out);
  double forward_bits() const;
  double reverse_bits() const;
  double mix(double* q_bits);
  double decouple(SoftGradient* g);
  double bucketed(SoftGradient* g);
  void write_gradient(const SoftGradient& g, double scale);
  double student_at(int64_t j) const;
  double teacher_log2_at(int64_t j) const;

  const Kernel& kernel_;
  const Args& args_;
  const double factor_;
  const float cs_, ct_, c1_ = kLog2e, power_;
  bool has_soft_, has_hard_, top_k_, map_holes_ = false;
  Hard hard_;      // where the exponentials of the cross-entropy come from, in blocks with a soft term
  bool shared_;    // T = 1: they are the soft term's
  bool separate_;  // they need a sweep of their own
  bool in_row_;    // x0 lies in the gradient's row
  bool keep_;      // exponentials are kept for a further sweep
  bool careful_ = false;

  int64_t label_ = -1;
  const void *student_ = nullptr, *teacher_ = nullptr;
  const int64_t* ids_ = nullptr;
  void* gradient_ = nullptr;
  float reference_s_ = 0, reference_t_ = 0, reference_1_ = 0;
  double logit_sum_ = 0;
  double label_gradient_ = 0;  // decoupled: the soft gradient of the label itself
  Total total_s_, total_t_, total_1_;
  std::vector<Block> blocks_;
  std::vector<double> id_gradient_, log_p_, log_q_;
  float *x0_ = nullptr, *x1_ = nullptr, *x2_ = nullptr;
  float *buffer_s_ = nullptr, *buffer_h_ = nullptr, *buffer_t_ = nullptr, *copy_ = nullptr;
  const float *s_ = nullptr, *plain_ = nullptr, *t_ = nullptr;  // the open block: student with holes, student as it is, teacher
};

}  // namespace pycompress::kd_loss
