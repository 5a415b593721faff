// Distillation loss and its gradient in one sweep per row. For a row with student logits s, teacher logits t, label y:
//
//   p = softmax(t / T), q = softmax(s / T)
//   loss = weight * (soft_weight * T^2 * D(p, q) + hard_weight * CE(softmax(s), y))
//
//   forward   D = sum p (log p - log q)                               T^2 dD/ds = T (q - p)
//   reverse   D = sum q (log q - log p)                               T^2 dD/ds = T q ((log q - log p) - D)
//   jsd       D = beta KL(p || m) + (1 - beta) KL(q || m)             T^2 dD/ds = T (1 - beta) q (log(q / m) - KL(q || m))
//             m = beta p + (1 - beta) q, 0 < beta < 1
//   decoupled D = target_weight * KL of (y, rest) + nontarget_weight * KL among the rest    (Zhao et al. 2022, arXiv 2203.08679)
//
// Everything is computed in powers of two: 2^(c x - d) with c = log2(e) / T and d close to c * (largest x seen so far), which
// costs one fma per element and needs no pass for the maximum. The exponentials of a row are kept in scratch (or in the
// gradient's own row), so that the second sweep is a linear combination of them without another exp:
//
//   gradient = a * x0 - b * x1 + c * (x0^T or x2) + k      x0 = 2^ys, x1 = 2^yt or 2^ys (ys - yt), x2 = 2^y1
//
// Rows are read in blocks that fit the L1 cache. Sums are float32 within a block and double across blocks.
// Logits up to 1e29 and minus infinity are in range; a NaN or plus infinity makes its row NaN.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/dispatch.h"
#include "core/target.h"
#include "core/types.h"

namespace pycompress::kd_loss {

inline constexpr int64_t kBlock = 1024;        // elements of a block: s, t and three results are 20 KB
inline constexpr int64_t kSmall = 48;          // up to this many classes, lanes hold rows instead of classes
inline constexpr float kHole = -1e30f;         // a logit that takes no part: its exponential is 0 and it is finite
inline constexpr float kNoReference = -1e29f;  // values up to here are no reference point for a block
inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Divergence : int { forward = 0, reverse, jsd, decoupled };
enum class TeacherForm : int { logits = 0, probabilities, log_probabilities };
enum class Reduction : int { none = 0, sum, mean, batchmean };

// What a sweep does with the teacher, and where the exponentials of the cross-entropy come from.
enum class Soft : int { forward = 0, reverse, plain };                  // x1 = 2^yt, 2^ys (ys - yt), 2^yt without a cross sum
enum class Hard : int { none = 0, own, square, cube, fourth, kCount };  // nothing, 2^(c1 s - d1), or (2^ys)^T for T = 2, 3, 4

// One block of a row.
struct Sweep {
  const float* s;
  const float* t;
  int64_t n;
  float cs, ds, ct, dt, c1, d1;  // ys = cs * s - ds, yt = ct * t - dt, y1 = c1 * s - d1
  float *x0, *x1, *x2;
  float sum_s, sum_t, sum_1;  // results: sums of the exponentials; infinite where an exponent passed its range
  float cross;                // forward: sum 2^yt (yt - ys); reverse: sum 2^ys (ys - yt)
};

// Second sweep of the Jensen-Shannon divergence: x1 becomes q log2(q / m).
struct Mix {
  const float* s;
  const float* t;
  int64_t n;
  float cs, ds, ct, dt;
  const float* x0;
  float* x1;
  float factor_s, factor_t;  // q = factor_s * x0, p = factor_t * x1
  float shift;               // log2 p - log2 q = yt - ys + shift
  float beta;
  float sum_p, sum_q;  // results: KL(p || m) and KL(q || m) of the block, in bits
};

// Last sweep: out = a * x0 - b * x1 + c * (x0^T or x2) + k. out may be x0.
struct Combine {
  const float *x0, *x1, *x2;
  int64_t n;
  float a, b, c, k;
  float* out;
};

// Rows across lanes, [class][lane]: one tile holds Kernel::lanes rows of at most kSmall classes.
struct Tile {
  const float* s;
  const float* t;
  float *x0, *x1, *x2;  // scratch; x0 ends as the gradient (without the label's own entry)
  int64_t classes;
  float cs, ct;
  float soft, hard, smoothing, beta;  // soft = soft_weight * T^2 * ln 2 for the loss
  float soft_gradient;                // soft_weight * T, times (1 - beta) for jsd
  bool gradient;
  const float* label_logit;  // per lane
  const float* scale;        // per lane: factor of the gradient; 0 for ignored rows, whose logits are 0
  float* loss;               // per lane, without row weight
};

struct Kernel {
  const char* name;
  Isa isa;
  int lanes;
  void (*const (*sweep)[2])(Sweep&);  // [soft * Hard::kCount + hard][careful]: careful drops 0 * inf from the cross sum
  void (*sweep_one)(Sweep&);          // x0 = 2^ys and sum_s only
  void (*mix)(Mix&);
  void (*const* combine)(const Combine&);   // [pair * Hard::kCount + hard]
  void (*const (*tile)[2])(const Tile&);    // [soft: none, forward, reverse, jsd][hard]
  float (*max)(const float* x, int64_t n);  // NaN or the largest
  double (*sum)(const float* x, int64_t n);
  void (*log2)(float* x, int64_t n);  // in place; 0 gives minus infinity, below 0 NaN
  void (*widen)(const void* src, DType dtype, int64_t n, float* dst);
  void (*narrow)(const float* src, int64_t n, DType dtype, void* dst);
};

const KernelList<Kernel>& kernels();

struct Args {
  int64_t rows, classes;
  const void* student;  // (rows, classes), row stride lds in elements
  int64_t lds;
  DType student_dtype;
  const void* teacher;  // (rows, teacher_classes), row stride ldt; or null without a soft term
  int64_t ldt, teacher_classes;
  DType teacher_dtype;
  TeacherForm form;
  const int64_t* ids;        // top-k teacher: (rows, teacher_classes) contiguous student classes, or null
  bool tail;                 // top-k: what the teacher's probabilities lack to 1 belongs to the other classes together
  const int64_t* class_map;  // (classes): teacher class of each student class, -1 for none; or null
  int64_t common;            // leading classes that the soft term compares
  const int64_t* labels;     // (rows) or null
  int64_t ignore_index;
  const float* row_weights;  // (rows) or null
  Divergence divergence;
  double temperature, soft_weight, hard_weight, beta, target_weight, nontarget_weight, label_smoothing;
  Reduction reduction;
  double denominator;  // 0: from `reduction`; else what the sum is divided by
  int64_t batch;       // denominator of batchmean
  float* loss;         // (rows) for Reduction::none, else one value
  void* gradient;      // (rows, classes), row stride ldg, dtype of the student, may be the student; null for none
  int64_t ldg;
};

// Weight of the rows that count (their number without row_weights). Throws std::invalid_argument for labels, ids, weights or a
// class map out of range, before anything is written.
double check(const Args& args);

void run(const Kernel& kernel, const Args& args);

}  // namespace pycompress::kd_loss
