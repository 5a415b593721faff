// Scalar maths of one row of kd_loss, shared by the kernels for the CPU and for CUDA. Logarithms are to base 2, in bits.
#pragma once
#include <cmath>

#include "kd_loss/kd_loss.h"

#ifdef __CUDACC__
#define PC_HOST_DEVICE __host__ __device__
#else
#define PC_HOST_DEVICE
#endif

namespace pycompress::kd_loss {

inline constexpr double kLn2 = 0.69314718055994530942;

PC_HOST_DEVICE inline double log2_sum(double a, double b) {  // log2(2^a + 2^b)
  const double top = a > b ? a : b;
  return std::isinf(top) ? top : top + std::log2(std::exp2(a - top) + std::exp2(b - top));
}

// A class without probability contributes 0, whatever the other model says; NaN stays.
PC_HOST_DEVICE inline double divergence_term(double p, double log_p, double log_other) {
  return p > 0.0 ? p * (log_p - log_other) : (p == 0.0 ? 0.0 : p);
}

// The decoupled divergence, and its gradient: scale_s * q - scale_t * p over the other classes among themselves, and the label's.
struct Decoupled {
  double bits, scale_s, scale_t, label_gradient;
};

// `rest`: KL among the other classes. `rest_s`, `rest_t`: logarithms of their sums; `label_s`, `label_t`: the label's exponents.
PC_HOST_DEVICE inline Decoupled decouple(double rest, double rest_s, double rest_t, double label_s, double label_t, double target_weight,
                                         double nontarget_weight) {
  const double log_s = log2_sum(rest_s, label_s), log_t = log2_sum(rest_t, label_t);
  const double q = std::exp2(label_s - log_s), p = std::exp2(label_t - log_t), q_rest = std::exp2(rest_s - log_s),
               p_rest = std::exp2(rest_t - log_t);
  const double target = divergence_term(p, label_t - log_t, label_s - log_s) + divergence_term(p_rest, rest_t - log_t, rest_s - log_s);
  // p - q from the smaller halves, so that a confident row loses no digits
  const double ahead = q < 0.5 ? p - q : q_rest - p_rest;
  return {target_weight * target + nontarget_weight * rest, nontarget_weight + target_weight * ahead, nontarget_weight,
          -target_weight * ahead};
}

// A divergence over few classes whose logarithms are known (a top-k teacher): sums of its terms, then the gradient.
struct Bits {
  double p = 0.0, q = 0.0;  // jsd: KL(p || m) and KL(q || m); forward has only p, reverse only q

  PC_HOST_DEVICE double total(Divergence divergence, double beta) const {
    return divergence == Divergence::jsd ? beta * p + (1.0 - beta) * q : divergence == Divergence::reverse ? q : p;
  }
  // sum of q_i slope_i, where slope_i = dD / dq_i
  PC_HOST_DEVICE double mean(Divergence divergence, double beta) const {
    return divergence == Divergence::jsd ? (1.0 - beta) * q : divergence == Divergence::reverse ? q : 0.0;
  }
};

PC_HOST_DEVICE inline double log2_mixture(double log_p, double log_q, double beta) {
  return log2_sum(std::log2(beta) + log_p, std::log2(1.0 - beta) + log_q);
}

PC_HOST_DEVICE inline void add_bits(Divergence divergence, double beta, double log_p, double log_q, Bits* bits) {
  const double p = std::exp2(log_p), q = std::exp2(log_q);
  if (divergence == Divergence::forward) {
    bits->p += divergence_term(p, log_p, log_q);
  } else if (divergence == Divergence::reverse) {
    bits->q += divergence_term(q, log_q, log_p);
  } else {
    const double log_m = log2_mixture(log_p, log_q, beta);
    bits->p += divergence_term(p, log_p, log_m);
    bits->q += divergence_term(q, log_q, log_m);
  }
}

// q_i (slope_i - mean), in nats: the gradient of a class that has its bucket alone.
PC_HOST_DEVICE inline double bucket_gradient(Divergence divergence, double beta, double log_p, double log_q, double mean) {
  const double p = std::exp2(log_p), q = std::exp2(log_q);
  if (divergence == Divergence::forward) return q - p;
  if (q == 0.0) return 0.0;
  const double slope = divergence == Divergence::reverse ? log_q - log_p : (1.0 - beta) * (log_q - log2_mixture(log_p, log_q, beta));
  return kLn2 * q * (slope - mean);
}

}  // namespace pycompress::kd_loss
