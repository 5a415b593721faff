// The row kernel of kd_loss on CUDA. Private to kd_loss_cuda.cu.
#pragma once
#include <cooperative_groups.h>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/math.cuh"
#include "kd_loss/kd_formulas.h"
#include "kd_loss/kd_loss_cuda.h"

namespace pycompress::kd_loss {

// What a row does with its teacher. top_k stands for every divergence of a top-k teacher.
enum class Mode : int { none = 0, forward, reverse, jsd, decoupled, top_k };

enum class Cross : int { none = 0, own, power };  // where the exponentials of the cross-entropy come from: nowhere, 2^(c1 s), (2^ys)^T

// Kernel arguments: Args as the device wants them.
struct RowArgs {
  const void* student;
  const void* teacher;
  const int64_t *ids, *class_map, *labels;
  const float *row_weights, *scale;
  float* row_loss;
  void* gradient;
  int64_t lds, ldt, ldg, ignore_index, teacher_classes;
  DType student_dtype, teacher_dtype;
  TeacherForm form;
  Divergence divergence;
  Cross hard;
  int classes, common, k, power;
  bool tail, holes, on_chip, vector_s, vector_t, vector_g;
  int cluster;
  float cs, ct, factor;  // factor: of the gradient where there is no `scale`
  double temperature, soft_weight, hard_weight, beta, target_weight, nontarget_weight, smoothing;
};

// Sums over some classes of a row, relative to their largest exponents.
struct Stats {
  float base_s, sum_s, base_t, sum_t, base_1, sum_1;
  float cross;  // forward: sum 2^yt (yt - ys); reverse: sum 2^ys (ys - yt)
  float logit_sum;
};

// Of the gradient: a * 2^ys - b * 2^yt + c * e1 + k, or what the divergence makes of a and b.
struct Coefficients {
  float ref_s, ref_t, ref_1;  // exponents are measured from here
  float a, b, c, k;
  float to_q, to_p, shift;  // jsd: probabilities from exponentials, log2 p - log2 q from yt - ys
  float label;              // added to the label's gradient; decoupled: its whole gradient
};

constexpr float kBelow = -kInfinity;

__device__ __forceinline__ float reference(float base) { return base == kBelow ? 0.0f : base; }

__device__ __forceinline__ float raised_to(float e, int power) {
  const float square = e * e;
  return power == 1 ? e : power == 2 ? square : power == 3 ? square * e : square * square;
}

// How far `base` moves up to reach `candidate`; 0 where there was nothing below it.
__device__ __forceinline__ float rebase(float& base, float candidate) {
  if (!(candidate > base)) return 0.0f;
  const float distance = base == kBelow ? 0.0f : candidate - base;
  base = candidate;
  return distance;
}

template <Mode mode>
__device__ __forceinline__ void move_bases(Stats& a, float to_s, float to_t, float to_1, Cross hard, int power) {
  const float ds = rebase(a.base_s, to_s), dt = rebase(a.base_t, to_t), d1 = rebase(a.base_1, to_1);
  if (ds == 0.0f && dt == 0.0f && d1 == 0.0f) return;
  const float fs = cuda::exp2_fast(-ds), ft = cuda::exp2_fast(-dt);
  // A factor of 0 says that none of these classes is left, also where their cross sum is infinite.
  if (mode == Mode::forward || mode == Mode::decoupled) a.cross = ft == 0.0f ? 0.0f : ft * (a.cross + a.sum_t * (ds - dt));
  if (mode == Mode::reverse) a.cross = fs == 0.0f ? 0.0f : fs * (a.cross + a.sum_s * (dt - ds));
  a.sum_s *= fs;
  a.sum_t *= ft;
  a.sum_1 *= hard == Cross::power ? raised_to(fs, power) : cuda::exp2_fast(-d1);
}

template <Mode mode>
__device__ __forceinline__ void merge(Stats& a, Stats b, Cross hard, int power) {
  const float to_s = fmaxf(a.base_s, b.base_s), to_t = fmaxf(a.base_t, b.base_t), to_1 = fmaxf(a.base_1, b.base_1);
  move_bases<mode>(a, to_s, to_t, to_1, hard, power);
  move_bases<mode>(b, to_s, to_t, to_1, hard, power);
  a.sum_s += b.sum_s, a.sum_t += b.sum_t, a.sum_1 += b.sum_1;
  a.cross += b.cross, a.logit_sum += b.logit_sum;
}

// ---- reading and writing eight classes

__device__ __forceinline__ int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

__device__ __forceinline__ float load_one(const void* row, DType dtype, int64_t j) {
  if (dtype == DType::f32) return static_cast<const float*>(row)[j];
  if (dtype == DType::bf16) return cuda::to_float(static_cast<const __nv_bfloat16*>(row)[j]);
  return cuda::to_float(static_cast<const __half*>(row)[j]);
}

__device__ __forceinline__ void store_one(void* row, DType dtype, int64_t j, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(row)[j] = value;
  else if (dtype == DType::bf16)
    static_cast<__nv_bfloat16*>(row)[j] = cuda::from_float<__nv_bfloat16>(value);
  else
    static_cast<__half*>(row)[j] = cuda::from_float<__half>(value);
}

template <class T>
__device__ __forceinline__ void widen8(const void* row, int64_t j, float (&out)[8]) {
  const cuda::Eight<T> raw = cuda::load8(static_cast<const T*>(row) + j);
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = cuda::to_float(raw.v[i]);
}

template <class T>
__device__ __forceinline__ void narrow8(void* row, int64_t j, const float (&values)[8]) {
  cuda::Eight<T> raw;
#pragma unroll
  for (int i = 0; i < 8; ++i) raw.v[i] = cuda::from_float<T>(values[i]);
  cuda::store8(static_cast<T*>(row) + j, raw);
}

// The first n of eight classes; the others are minus infinity. `vector`: the row is aligned to 16 bytes.
__device__ __forceinline__ void load_chunk(const void* row, DType dtype, int64_t j, int n, bool vector, float (&out)[8]) {
  if (vector && n == 8) {
    if (dtype == DType::f32)
      widen8<float>(row, j, out);
    else if (dtype == DType::bf16)
      widen8<__nv_bfloat16>(row, j, out);
    else
      widen8<__half>(row, j, out);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = i < n ? load_one(row, dtype, j + i) : kBelow;
}

__device__ __forceinline__ void store_chunk(void* row, DType dtype, int64_t j, int n, bool vector, const float (&values)[8]) {
  if (vector && n == 8) {
    if (dtype == DType::f32)
      narrow8<float>(row, j, values);
    else if (dtype == DType::bf16)
      narrow8<__nv_bfloat16>(row, j, values);
    else
      narrow8<__half>(row, j, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < n) store_one(row, dtype, j + i, values[i]);
}

// Starts to copy a chunk into its slot in shared memory; what cannot be copied 16 bytes at a time is copied now.
__device__ __forceinline__ void fill_chunk(void* slot, const void* row, DType dtype, int64_t j, int n, bool vector) {
  const int64_t size = bytes_of(dtype);
  if (vector && n == 8) {
    const char* from = static_cast<const char*>(row) + j * size;
    cuda::async_copy16(slot, from, true);
    if (size == 4) cuda::async_copy16(static_cast<char*>(slot) + 16, from + 16, true);
    return;
  }
  for (int i = 0; i < n; ++i) {
    if (size == 4)
      static_cast<uint32_t*>(slot)[i] = static_cast<const uint32_t*>(row)[j + i];
    else
      static_cast<uint16_t*>(slot)[i] = static_cast<const uint16_t*>(row)[j + i];
  }
}

// log2 of the teacher's weight of a class, but for the normalisation.
__device__ __forceinline__ float teacher_log2(float t, TeacherForm form, float ct) {
  if (form != TeacherForm::probabilities) return ct * t;
  return t < 0x1p-126f ? (t >= 0.0f ? kBelow : kNaN) : log2f(t);
}

// ---- one row of one block

template <Mode mode>
struct Row {
  static constexpr bool kPair = mode == Mode::forward || mode == Mode::reverse || mode == Mode::jsd || mode == Mode::decoupled;

  const RowArgs& p;
  const void *student, *teacher;  // of the row, in global memory
  char *slots_s, *slots_t;        // chunks of this block in shared memory, where they fit
  unsigned* marks;                // top_k: a bit for each class of this block that the teacher names
  int label;                      // -1: none
  int first, chunks;              // of this block

  __device__ __forceinline__ int local(int turn) const { return turn * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int turns() const { return (chunks + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x); }
  __device__ __forceinline__ int count(int j, int end) const { return end - j < 8 ? (end > j ? end - j : 0) : 8; }

  __device__ void fill(int turn) const {
    const int c = local(turn);
    if (c >= chunks) return;
    const int j = (first + c) * 8, n = count(j, p.classes);
    fill_chunk(slots_s + c * 8 * bytes_of(p.student_dtype), student, p.student_dtype, j, n, p.vector_s);
    if (!kPair) return;
    char* slot = slots_t + c * 8 * bytes_of(p.teacher_dtype);
    const int m = count(j, p.common);
    if (p.class_map) {
      for (int i = 0; i < m; ++i) {
        const int64_t from = p.class_map[j + i];
        if (from >= 0 && from < p.teacher_classes) store_one(slot, p.teacher_dtype, i, load_one(teacher, p.teacher_dtype, from));
      }
    } else {
      fill_chunk(slot, teacher, p.teacher_dtype, j, m, p.vector_t);
    }
  }

  // Student as it is, student without the classes that the soft term does not compare, and the teacher's exponents over ct.
  __device__ __forceinline__ void load(int c, int j, int n, float (&s)[8], float (&soft)[8], float (&t)[8]) const {
    if (p.on_chip) {
      load_chunk(slots_s, p.student_dtype, static_cast<int64_t>(c) * 8, 8, true, s);
      if (n < 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) s[i] = i < n ? s[i] : kBelow;
      }
    } else {
      load_chunk(student, p.student_dtype, j, n, p.vector_s, s);
    }
    if (kPair) {
      const int m = count(j, p.common);
      if (p.on_chip) {
        load_chunk(slots_t, p.teacher_dtype, static_cast<int64_t>(c) * 8, 8, true, t);
      } else if (p.class_map) {
        for (int i = 0; i < 8; ++i) {
          const int64_t from = i < m ? p.class_map[j + i] : -1;
          t[i] = from >= 0 && from < p.teacher_classes ? load_one(teacher, p.teacher_dtype, from) : kBelow;
        }
      } else {
        load_chunk(teacher, p.teacher_dtype, j, m, p.vector_t, t);
      }
      if (p.form == TeacherForm::probabilities) {
#pragma unroll
        for (int i = 0; i < 8; ++i) t[i] = i < m ? teacher_log2(t[i], p.form, 1.0f) : kBelow;
      } else if (m < 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) t[i] = i < m ? t[i] : kBelow;
      }
    }
    unsigned out = 0;  // bits of the classes left out
    if (mode == Mode::decoupled && label >= j && label < j + 8) out = 1u << (label - j);
    if (mode == Mode::top_k) out = marks[c / 4] >> (8 * (c % 4)) & 0xffu;
    if (kPair && p.holes)
      for (int i = 0; i < 8; ++i) {
        const int64_t from = j + i >= p.common ? -1 : p.class_map ? p.class_map[j + i] : 0;
        if (from < 0) out |= 1u << i;
        if (from >= p.teacher_classes) s[i] = kNaN;  // out of range: the row becomes NaN
      }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      soft[i] = out >> i & 1u ? kBelow : s[i];
      if (kPair && (out >> i & 1u)) t[i] = kBelow;
    }
  }

  __device__ __forceinline__ void sum_chunk(int c, Stats& a) const {
    const int j = (first + c) * 8, n = count(j, p.classes);
    float s[8], soft[8], t[8];
    load(c, j, n, s, soft, t);
    float top_s = kBelow, top_t = kBelow, top_1 = kBelow;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      top_s = fmaxf(top_s, soft[i]);
      if (kPair) top_t = fmaxf(top_t, t[i]);
      if (p.hard == Cross::own) top_1 = fmaxf(top_1, s[i]);
    }
    move_bases<mode>(a, mode == Mode::none && p.hard == Cross::own ? kBelow : p.cs * top_s, p.ct * top_t, kLog2e * top_1, p.hard, p.power);
    const float ref_s = reference(a.base_s), ref_t = reference(a.base_t), ref_1 = reference(a.base_1);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float ys = 0.0f, es = 0.0f;
      if (mode != Mode::none || p.hard == Cross::power) {
        ys = fmaf(p.cs, soft[i], -ref_s);
        es = cuda::exp2_fast(ys);
        a.sum_s += es;
      }
      if (kPair) {
        const float yt = fmaf(p.ct, t[i], -ref_t), et = cuda::exp2_fast(yt);
        a.sum_t += et;
        if (mode == Mode::forward || mode == Mode::decoupled) a.cross = et == 0.0f ? a.cross : fmaf(et, yt - ys, a.cross);
        if (mode == Mode::reverse) a.cross = es == 0.0f ? a.cross : fmaf(es, ys - yt, a.cross);
      }
      if (p.hard == Cross::power)
        a.sum_1 += raised_to(es, p.power);
      else if (p.hard == Cross::own)
        a.sum_1 += cuda::exp2_fast(fmaf(kLog2e, s[i], -ref_1));
      if (p.smoothing > 0.0 && i < n) a.logit_sum += s[i];
    }
  }

  // The first sweep. Copies into shared memory are all started at once and awaited in four parts.
  __device__ Stats sums() const {
    Stats a{kBelow, 0, kBelow, 0, kBelow, 0, 0, 0};
    const int all = turns();
    int turn = 0;
    if (p.on_chip) {
      for (int part = 1; part <= 4; ++part) {
        for (; turn < all * part / 4; ++turn) fill(turn);
        cuda::async_commit();
      }
      turn = 0;
      for (int part = 1; part <= 4; ++part) {
        if (part == 1) cuda::async_wait<3>();
        if (part == 2) cuda::async_wait<2>();
        if (part == 3) cuda::async_wait<1>();
        if (part == 4) cuda::async_wait<0>();
        for (; turn < all * part / 4; ++turn)
          if (local(turn) < chunks) sum_chunk(local(turn), a);
      }
    } else {
      for (; turn < all; ++turn)
        if (local(turn) < chunks) sum_chunk(local(turn), a);
    }
    return a;
  }

  // q log2(q / m) and p log2(p / m), as mix_terms of kd_loss_sweep.h.
  __device__ __forceinline__ void mix(float es, float et, float ys, float yt, const Coefficients& co, float* from_p, float* from_q) const {
    const float q = es * co.to_q, prob = et * co.to_p, ratio = yt - ys + co.shift, beta = static_cast<float>(p.beta);
    const float large = fmaxf(1.1754944e-38f, fmaxf(prob, q)), quotient = fminf(prob, q) / large;
    const float weight = prob < q ? beta : 1.0f - beta;
    const float log_m = log2f(fmaf(weight, quotient - 1.0f, 1.0f));
    *from_p = prob > 0.0f ? prob * ((ratio < 0.0f ? ratio : 0.0f) - log_m) : prob;
    *from_q = q > 0.0f ? q * ((ratio > 0.0f ? -ratio : 0.0f) - log_m) : q;
  }

  // jsd: KL(p || m) and KL(q || m) of this thread's classes, in bits.
  __device__ void mixed(const Coefficients& co, float* p_bits, float* q_bits) const {
    for (int turn = 0; turn < turns(); ++turn) {
      const int c = local(turn);
      if (c >= chunks) break;
      const int j = (first + c) * 8;
      float s[8], soft[8], t[8];
      load(c, j, count(j, p.classes), s, soft, t);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float ys = fmaf(p.cs, soft[i], -co.ref_s), yt = fmaf(p.ct, t[i], -co.ref_t);
        float from_p, from_q;
        mix(cuda::exp2_fast(ys), cuda::exp2_fast(yt), ys, yt, co, &from_p, &from_q);
        *p_bits += from_p;
        *q_bits += from_q;
      }
    }
  }

  // The last sweep.
  __device__ void write_gradient(const Coefficients& co, void* out) const {
    for (int turn = 0; turn < turns(); ++turn) {
      const int c = local(turn);
      if (c >= chunks) break;
      const int j = (first + c) * 8, n = count(j, p.classes);
      float s[8], soft[8], t[8], g[8];
      load(c, j, n, s, soft, t);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float ys = 0.0f, es = 0.0f, value = 0.0f;
        if (mode != Mode::none || p.hard == Cross::power) {
          ys = fmaf(p.cs, soft[i], -co.ref_s);
          es = cuda::exp2_fast(ys);
        }
        if (kPair) {
          const float yt = fmaf(p.ct, t[i], -co.ref_t), et = cuda::exp2_fast(yt);
          if (mode == Mode::forward || mode == Mode::decoupled) {
            value = __fadd_rn(__fmul_rn(co.a, es), -__fmul_rn(co.b, et));  // no fma: equal models give exactly 0
          } else if (mode == Mode::reverse) {
            value = es == 0.0f ? 0.0f : es * fmaf(co.b, ys - yt, co.a);
          } else {
            float from_p, from_q;
            mix(es, et, ys, yt, co, &from_p, &from_q);
            value = fmaf(co.b, from_q, co.a * es);
          }
        } else if (mode == Mode::top_k) {
          value = co.a * es;
        }
        float e1 = 0.0f;
        if (p.hard == Cross::power)
          e1 = raised_to(es, p.power);
        else if (p.hard == Cross::own)
          e1 = cuda::exp2_fast(fmaf(kLog2e, s[i], -co.ref_1));
        g[i] = value + fmaf(co.c, e1, co.k);
        if (j + i == label) g[i] = mode == Mode::decoupled ? co.label : g[i] + co.label;
      }
      store_chunk(out, p.student_dtype, j, n, p.vector_g, g);
    }
  }
};

// ---- reductions of a block

struct AddDouble {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct MaxDouble {
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// `scratch`: 32 values; free again when it returns.
template <class Operation>
__device__ double reduce_double(double value, Operation operation, double* scratch) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value = operation(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / 32; ++i) value = operation(value, scratch[i]);
  __syncthreads();
  return value;
}

template <Mode mode>
__device__ Stats reduce_warp(Stats a, Cross hard, int power) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    Stats b;
    b.base_s = __shfl_xor_sync(0xffffffffu, a.base_s, lanes), b.sum_s = __shfl_xor_sync(0xffffffffu, a.sum_s, lanes);
    b.base_t = __shfl_xor_sync(0xffffffffu, a.base_t, lanes), b.sum_t = __shfl_xor_sync(0xffffffffu, a.sum_t, lanes);
    b.base_1 = __shfl_xor_sync(0xffffffffu, a.base_1, lanes), b.sum_1 = __shfl_xor_sync(0xffffffffu, a.sum_1, lanes);
    b.cross = __shfl_xor_sync(0xffffffffu, a.cross, lanes), b.logit_sum = __shfl_xor_sync(0xffffffffu, a.logit_sum, lanes);
    merge<mode>(a, b, hard, power);
  }
  return a;
}

__device__ __forceinline__ void sync_cluster(int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) {
    cooperative_groups::this_cluster().sync();
    return;
  }
#endif
  __syncthreads();
}

// This variable in the block of rank `rank`.
template <class T>
__device__ __forceinline__ T* of_rank(T* variable, int rank, int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) return cooperative_groups::this_cluster().map_shared_rank(variable, static_cast<unsigned>(rank));
#endif
  return variable;
}

// What the top-k teacher says: its part of the divergence and the gradients of the named classes.
struct Named {
  float *s, *log_p, *gradient;  // (k) in shared memory
};

// Bits of the divergence over k classes and one bucket for all others. Fills named.gradient; *rest is the bucket's gradient.
__device__ inline double bucketed(const RowArgs& p, const Named& named, double log_rest, double* scratch, double* rest) {
  const int step = static_cast<int>(blockDim.x), begin = static_cast<int>(threadIdx.x);
  const double below = kBelow;
  double kept = 0.0, top_p = below, top_q = below;
  for (int i = begin; i < p.k; i += step) {
    const double log_p = named.log_p[i], log_q = static_cast<double>(p.cs) * named.s[i];
    kept += std::exp2(log_p);
    top_p = log_p > top_p ? log_p : top_p;
    top_q = log_q > top_q ? log_q : top_q;
  }
  double bucket_p = below;
  if (p.tail) {
    kept = reduce_double(kept, AddDouble{}, scratch);
    bucket_p = kept < 1.0 ? std::log2(1.0 - kept) : (kept == kept ? below : kept);
  }
  top_p = reduce_double(bucket_p > top_p ? bucket_p : top_p, MaxDouble{}, scratch);
  top_q = reduce_double(log_rest > top_q ? log_rest : top_q, MaxDouble{}, scratch);
  double sum_p = 0.0, sum_q = 0.0;
  for (int i = begin; i < p.k; i += step) {
    sum_p += std::exp2(named.log_p[i] - top_p);
    sum_q += std::exp2(static_cast<double>(p.cs) * named.s[i] - top_q);
  }
  sum_p = reduce_double(sum_p, AddDouble{}, scratch) + std::exp2(bucket_p - top_p);
  sum_q = reduce_double(sum_q, AddDouble{}, scratch) + std::exp2(log_rest - top_q);
  const double log_sum_p = top_p + std::log2(sum_p), log_sum_q = top_q + std::log2(sum_q);
  Bits bits;
  for (int i = begin; i < p.k; i += step)
    add_bits(p.divergence, p.beta, named.log_p[i] - log_sum_p, static_cast<double>(p.cs) * named.s[i] - log_sum_q, &bits);
  bits.p = reduce_double(bits.p, AddDouble{}, scratch);
  bits.q = reduce_double(bits.q, AddDouble{}, scratch);
  add_bits(p.divergence, p.beta, bucket_p - log_sum_p, log_rest - log_sum_q, &bits);
  const double mean = bits.mean(p.divergence, p.beta);
  for (int i = begin; i < p.k; i += step)
    named.gradient[i] = static_cast<float>(
        bucket_gradient(p.divergence, p.beta, named.log_p[i] - log_sum_p, static_cast<double>(p.cs) * named.s[i] - log_sum_q, mean));
  *rest = log_rest == below ? 0.0 : bucket_gradient(p.divergence, p.beta, bucket_p - log_sum_p, log_rest - log_sum_q, mean);
  return bits.total(p.divergence, p.beta);
}

// 2^log2 * factor for sums that may be 0.
__device__ __forceinline__ double over(double numerator, float sum) { return sum == 0.0f ? 0.0 : numerator / sum; }

// Blocks that a multiprocessor holds at once: what the registers allow without spilling.
constexpr int resident_blocks(Mode mode) { return mode == Mode::decoupled || mode == Mode::top_k ? 2 : 3; }

// One row per cluster of p.cluster blocks.
template <Mode mode>
__global__ void __launch_bounds__(kCudaMaxThreads, resident_blocks(mode)) row_kernel(const __grid_constant__ RowArgs p) {
  __shared__ Stats warp_stats[kCudaMaxThreads / 32], block_stats;
  __shared__ Coefficients co;
  __shared__ double scratch[kCudaMaxThreads / 32], block_bits[2], row_bits;
  constexpr bool kPair = Row<mode>::kPair;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t row = blockIdx.x / static_cast<unsigned>(p.cluster);
  const int rank = static_cast<int>(blockIdx.x) % p.cluster;
  const int64_t chunks = (p.classes + 7) / 8, per_block = (chunks + p.cluster - 1) / p.cluster;

  Row<mode> r{p, nullptr, nullptr, nullptr, nullptr, nullptr, -1, 0, 0};
  r.first = static_cast<int>(rank * per_block);
  r.chunks = static_cast<int>(chunks - r.first < per_block ? (chunks > r.first ? chunks - r.first : 0) : per_block);
  const int64_t size_s = bytes_of(p.student_dtype), size_t_ = bytes_of(p.teacher_dtype);
  r.student = static_cast<const char*>(p.student) + row * p.lds * size_s;
  if (mode != Mode::none) r.teacher = static_cast<const char*>(p.teacher) + row * p.ldt * size_t_;
  void* gradient = p.gradient ? static_cast<char*>(p.gradient) + row * p.ldg * size_s : nullptr;

  const int64_t label = p.labels ? p.labels[row] : -1;
  const float weight = p.row_weights ? p.row_weights[row] : 1.0f;
  if ((p.labels && label == p.ignore_index) || weight == 0.0f) {  // the whole cluster leaves
    if (thread == 0 && rank == 0) p.row_loss[row] = 0.0f;
    const float zeros[8] = {};
    if (gradient)
      for (int c = thread; c < r.chunks; c += threads) {
        const int j = (r.first + c) * 8;
        store_chunk(gradient, p.student_dtype, j, r.count(j, p.classes), p.vector_g, zeros);
      }
    return;
  }
  bool bad = !(weight > 0.0f) || (p.labels && (label < 0 || label >= p.classes));
  r.label = p.labels && !bad ? static_cast<int>(label) : -1;

  char* memory = cuda::dynamic_shared<char>();
  if (p.on_chip) {
    r.slots_s = memory, memory += per_block * 8 * size_s;
    if (kPair) r.slots_t = memory, memory += per_block * 8 * size_t_;
  }
  Named named{};
  const int64_t* ids = nullptr;
  if (mode == Mode::top_k) {
    ids = p.ids + row * p.k;
    named.s = reinterpret_cast<float*>(memory), named.log_p = named.s + p.k, named.gradient = named.log_p + p.k;
    r.marks = reinterpret_cast<unsigned*>(named.gradient + p.k);
    for (int i = thread; i < (per_block + 3) / 4; i += threads) r.marks[i] = 0;
    __syncthreads();
    for (int i = thread; i < p.k; i += threads) {
      const int64_t id = ids[i];
      if (id < 0 || id >= p.classes) {
        bad = true;
        named.s[i] = named.log_p[i] = kNaN;
        continue;
      }
      named.s[i] = load_one(r.student, p.student_dtype, id);
      named.log_p[i] = teacher_log2(load_one(r.teacher, p.teacher_dtype, i), p.form, p.ct);
      const int64_t c = id / 8 - r.first;
      if (c < 0 || c >= r.chunks) continue;
      const unsigned bit = 1u << (8 * (c % 4) + id % 8);
      if (atomicOr(&r.marks[c / 4], bit) & bit) bad = true;  // named twice
    }
    __syncthreads();
  }
  // Before anyone writes the gradient, which may lie over the student.
  float label_s = 0.0f, label_t = 0.0f;
  if (thread == 0 && r.label >= 0) {
    label_s = load_one(r.student, p.student_dtype, r.label);
    if (mode == Mode::decoupled) label_t = teacher_log2(load_one(r.teacher, p.teacher_dtype, r.label), p.form, p.ct);
  }

  Stats stats = r.sums();
  if (bad) stats.logit_sum = kNaN;  // takes the verdict to every block of the row
  stats = reduce_warp<mode>(stats, p.hard, p.power);
  if (thread % 32 == 0) warp_stats[thread / 32] = stats;
  __syncthreads();
  if (thread < 32) {
    stats = thread < threads / 32 ? warp_stats[thread] : Stats{kBelow, 0, kBelow, 0, kBelow, 0, 0, 0};
    stats = reduce_warp<mode>(stats, p.hard, p.power);
    if (thread == 0) block_stats = stats;
  }
  sync_cluster(p.cluster);
  stats = *of_rank(&block_stats, 0, p.cluster);
  for (int other = 1; other < p.cluster; ++other) merge<mode>(stats, *of_rank(&block_stats, other, p.cluster), p.hard, p.power);

  // From here on every thread of the row knows the sums; thread 0 works out what is needed once.
  const double log_s = static_cast<double>(log2f(stats.sum_s)) + stats.base_s,
               log_t = static_cast<double>(log2f(stats.sum_t)) + stats.base_t;
  const bool wrong = p.smoothing > 0.0 ? isnan(stats.logit_sum) : stats.logit_sum != 0.0f;
  const double scale = weight * (p.scale ? static_cast<double>(*p.scale) : static_cast<double>(p.factor));
  const double soft = p.soft_weight * p.temperature * scale, hard = p.hard_weight * scale;
  double rest = 0.0;
  if (mode == Mode::jsd) {
    if (thread == 0) {
      co.ref_s = reference(stats.base_s), co.ref_t = reference(stats.base_t);
      co.to_q = 1.0f / stats.sum_s, co.to_p = 1.0f / stats.sum_t;
      co.shift = static_cast<float>(static_cast<double>(log2f(stats.sum_s)) - log2f(stats.sum_t));
    }
    __syncthreads();
    float p_bits = 0.0f, q_bits = 0.0f;
    r.mixed(co, &p_bits, &q_bits);
    const double all_p = reduce_double(p_bits, AddDouble{}, scratch), all_q = reduce_double(q_bits, AddDouble{}, scratch);
    if (thread == 0) block_bits[0] = all_p, block_bits[1] = all_q;
    sync_cluster(p.cluster);
  }
  if (mode == Mode::top_k) {
    const double bits = bucketed(p, named, stats.sum_s == 0.0f ? static_cast<double>(kBelow) : log_s, scratch, &rest);
    if (thread == 0) row_bits = bits;
  }
  if (thread == 0) {
    double bits = 0.0, a = 0.0, b = 0.0, label_gradient = 0.0;
    if (mode == Mode::forward) {
      bits = over(stats.cross, stats.sum_t) + (log2f(stats.sum_s) - static_cast<double>(log2f(stats.sum_t)));
      a = over(soft, stats.sum_s), b = over(soft, stats.sum_t);
    } else if (mode == Mode::reverse) {
      const double between = static_cast<double>(log2f(stats.sum_t)) - log2f(stats.sum_s);
      bits = over(stats.cross, stats.sum_s) + between;
      b = over(soft * kLn2, stats.sum_s), a = b * (between - bits);
    } else if (mode == Mode::jsd) {
      double p_bits = 0.0, q_bits = 0.0;
      for (int other = 0; other < p.cluster; ++other) {
        const double* from = of_rank(block_bits, other, p.cluster);
        p_bits += from[0], q_bits += from[1];
      }
      bits = p.beta * p_bits + (1.0 - p.beta) * q_bits;
      b = soft * kLn2 * (1.0 - p.beta), a = -over(b * q_bits, stats.sum_s);
    } else if (mode == Mode::decoupled) {
      const double among = over(stats.cross, stats.sum_t) + (log2f(stats.sum_s) - static_cast<double>(log2f(stats.sum_t)));
      const Decoupled d = decouple(among, log_s, log_t, static_cast<double>(p.cs) * label_s, label_t, p.target_weight, p.nontarget_weight);
      bits = d.bits;
      a = over(soft * d.scale_s, stats.sum_s), b = over(soft * d.scale_t, stats.sum_t), label_gradient = soft * d.label_gradient;
    } else if (mode == Mode::top_k) {
      bits = row_bits;
      a = over(soft * rest, stats.sum_s);
    }
    double loss = mode == Mode::none ? 0.0 : p.soft_weight * p.temperature * p.temperature * kLn2 * bits;
    double c = 0.0, k = 0.0;
    if (p.hard != Cross::none) {
      const double base_1 = p.hard == Cross::power ? static_cast<double>(p.power) * stats.base_s : stats.base_1;
      const double log_1 = static_cast<double>(log2f(stats.sum_1)) + base_1;
      const double own = log_1 - static_cast<double>(kLog2e) * label_s;
      const double uniform = p.smoothing > 0.0 ? log_1 - static_cast<double>(kLog2e) * stats.logit_sum / p.classes : 0.0;
      loss += p.hard_weight * kLn2 * ((1.0 - p.smoothing) * own + (p.smoothing > 0.0 ? p.smoothing * uniform : 0.0));
      c = over(hard, stats.sum_1);
      k = -hard * p.smoothing / p.classes;
      if (mode == Mode::decoupled)
        label_gradient += k - hard * (1.0 - p.smoothing) + hard * std::exp2(static_cast<double>(kLog2e) * label_s - log_1);
      else
        label_gradient = -hard * (1.0 - p.smoothing);
    }
    if (wrong) loss = k = label_gradient = kNaN;
    co.ref_s = reference(stats.base_s), co.ref_t = reference(stats.base_t), co.ref_1 = reference(stats.base_1);
    co.a = static_cast<float>(a), co.b = static_cast<float>(b), co.c = static_cast<float>(c), co.k = static_cast<float>(k);
    co.label = static_cast<float>(label_gradient);
    if (rank == 0) p.row_loss[row] = static_cast<float>(weight * loss);
  }
  __syncthreads();
  if (gradient) {
    r.write_gradient(co, gradient);
    if (mode == Mode::top_k) {
      __syncthreads();  // the named classes come last
      for (int i = thread; i < p.k; i += threads) {
        const int64_t id = ids[i];
        if (id / 8 < r.first || id / 8 >= r.first + r.chunks || id < 0) continue;
        float e1 = 0.0f;
        if (p.hard == Cross::own) e1 = cuda::exp2_fast(fmaf(kLog2e, named.s[i], -co.ref_1));
        const float value = static_cast<float>(soft * named.gradient[i]) + fmaf(co.c, e1, co.k) + (id == label ? co.label : 0.0f);
        store_one(gradient, p.student_dtype, id, value);
      }
    }
  }
  if (p.cluster > 1) sync_cluster(p.cluster);  // another block may still read this one's sums
}

}  // namespace pycompress::kd_loss
