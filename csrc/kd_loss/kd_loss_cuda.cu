#include "kd_loss/kd_loss_cuda.h"
#include "kd_loss/kd_loss_cuda_row.cuh"

namespace pycompress::kd_loss {
namespace {

constexpr int kReduceThreads = 512;

// scale = 1 / weight of the rows that count, 1 if none does.
__global__ void __launch_bounds__(kReduceThreads)
    denominator_kernel(const int64_t* labels, const float* row_weights, int64_t ignore_index, int64_t rows, float* scale) {
  __shared__ double scratch[kReduceThreads / 32];
  double total = 0.0;
  for (int64_t row = threadIdx.x; row < rows; row += kReduceThreads) {
    const float weight = row_weights ? row_weights[row] : 1.0f;
    if (weight > 0.0f && !(labels && labels[row] == ignore_index)) total += weight;
  }
  total = reduce_double(total, AddDouble{}, scratch);
  if (threadIdx.x == 0) *scale = static_cast<float>(total > 0.0 ? 1.0 / total : 1.0);
}

// loss = sum of row_loss * scale, always added in the same order.
__global__ void __launch_bounds__(kReduceThreads)
    total_kernel(const float* row_loss, int64_t rows, const float* scale, double factor, float* loss) {
  __shared__ double scratch[kReduceThreads / 32];
  double total = 0.0;
  for (int64_t row = threadIdx.x; row < rows; row += kReduceThreads) total += row_loss[row];
  total = reduce_double(total, AddDouble{}, scratch);
  if (threadIdx.x == 0) *loss = static_cast<float>(total * (scale ? static_cast<double>(*scale) : factor));
}

__global__ void __launch_bounds__(kCudaMaxThreads)
    scale_kernel(void* gradient, DType dtype, int64_t ldg, int classes, bool vector, const float* upstream, bool per_row) {
  const float factor = upstream[per_row ? blockIdx.x : 0u];
  if (factor == 1.0f) return;
  char* row = static_cast<char*>(gradient) + blockIdx.x * ldg * bytes_of(dtype);
  for (int j = static_cast<int>(threadIdx.x) * 8; j < classes; j += static_cast<int>(blockDim.x) * 8) {
    const int n = classes - j < 8 ? classes - j : 8;
    float g[8];
    load_chunk(row, dtype, j, n, vector, g);
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] *= factor;
    store_chunk(row, dtype, j, n, vector, g);
  }
}

using RowKernel = void (*)(RowArgs);

RowKernel row_kernel_for(const Args& a) {
  if (!a.teacher) return row_kernel<Mode::none>;
  if (a.ids) return row_kernel<Mode::top_k>;
  if (a.divergence == Divergence::forward) return row_kernel<Mode::forward>;
  if (a.divergence == Divergence::reverse) return row_kernel<Mode::reverse>;
  if (a.divergence == Divergence::jsd) return row_kernel<Mode::jsd>;
  return row_kernel<Mode::decoupled>;
}

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// 16 bytes at a time need every row to start at a multiple of them.
bool is_vector(const void* p, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

RowArgs row_args(const CudaCall& call) {
  const Args& a = call.args;
  RowArgs p{};
  p.student = a.student, p.lds = a.lds, p.student_dtype = a.student_dtype;
  p.teacher = a.teacher, p.ldt = a.ldt, p.teacher_dtype = a.teacher_dtype, p.teacher_classes = a.teacher_classes, p.form = a.form;
  p.ids = a.ids, p.k = a.ids ? static_cast<int>(a.teacher_classes) : 0, p.tail = a.tail;
  p.class_map = a.class_map, p.classes = static_cast<int>(a.classes), p.common = a.teacher ? static_cast<int>(a.common) : 0;
  p.labels = a.labels, p.ignore_index = a.ignore_index, p.row_weights = a.row_weights;
  p.divergence = a.divergence, p.temperature = a.temperature;
  p.soft_weight = a.soft_weight, p.hard_weight = a.hard_weight, p.beta = a.beta;
  p.target_weight = a.target_weight, p.nontarget_weight = a.nontarget_weight, p.smoothing = a.hard_weight > 0.0 ? a.label_smoothing : 0.0;
  p.row_loss = call.row_loss, p.gradient = a.gradient, p.ldg = a.ldg;
  const bool mean = a.reduction == Reduction::mean || call.scale_given;
  p.scale = mean ? call.scale : nullptr;
  p.factor = a.reduction == Reduction::batchmean ? static_cast<float>(1.0 / static_cast<double>(a.batch)) : 1.0f;
  p.cs = static_cast<float>(kLog2e / a.temperature);
  p.ct = a.form == TeacherForm::logits ? p.cs : a.form == TeacherForm::log_probabilities ? kLog2e : 1.0f;
  p.holes = a.teacher && !a.ids && (a.class_map || a.common < a.classes);
  const bool pair = a.teacher && !a.ids && !p.holes && a.divergence != Divergence::decoupled;
  const bool power = pair && (a.temperature == 1.0 || a.temperature == 2.0 || a.temperature == 3.0 || a.temperature == 4.0);
  p.hard = a.hard_weight > 0.0 ? (power ? Cross::power : Cross::own) : Cross::none;
  p.power = power ? static_cast<int>(a.temperature) : 0;
  p.cluster = call.cluster, p.on_chip = call.on_chip;
  p.vector_s = is_vector(a.student, a.lds, a.student_dtype);
  p.vector_t = a.teacher && !a.ids && !a.class_map && is_vector(a.teacher, a.ldt, a.teacher_dtype);
  p.vector_g = a.gradient && is_vector(a.gradient, a.ldg, a.student_dtype);
  return p;
}

}  // namespace

int64_t cuda_shared_bytes(const Args& a, int cluster, bool on_chip) {
  const int64_t chunks = ceil_div(ceil_div(a.classes, kCudaChunk), cluster);
  int64_t bytes = 0;
  if (on_chip) bytes += chunks * kCudaChunk * (size_of(a.student_dtype) + (a.teacher && !a.ids ? size_of(a.teacher_dtype) : 0));
  if (a.ids) bytes += 3 * 4 * a.teacher_classes + 4 * ceil_div(chunks, 4);
  return bytes;
}

void run_cuda(const CudaCall& call) {
  const Args& a = call.args;
  const char* const what = "kd_loss";
  const cuda::DeviceGuard guard(call.device, what);
  if (a.reduction == Reduction::mean && !call.scale_given)
    cuda::launch(what, {dim3(1), kReduceThreads, 0, 1}, call.stream, denominator_kernel, a.labels, a.row_weights, a.ignore_index, a.rows,
                 call.scale);
  const RowArgs p = row_args(call);
  cuda::Grid grid;
  grid.blocks = dim3(static_cast<unsigned>(a.rows * call.cluster));
  grid.threads = static_cast<unsigned>(call.threads);
  grid.shared_bytes = static_cast<size_t>(cuda_shared_bytes(a, call.cluster, call.on_chip));
  grid.cluster = static_cast<unsigned>(call.cluster);
  cuda::launch(what, grid, call.stream, row_kernel_for(a), p);
  if (a.reduction != Reduction::none)
    cuda::launch(what, {dim3(1), kReduceThreads, 0, 1}, call.stream, total_kernel, static_cast<const float*>(call.row_loss), a.rows,
                 p.scale, static_cast<double>(p.factor), a.loss);
}

void scale_cuda(const ScaleCall& c) {
  const cuda::DeviceGuard guard(c.device, "kd_loss");
  cuda::launch("kd_loss", {dim3(static_cast<unsigned>(c.rows)), kCudaMaxThreads, 0, 1}, c.stream, scale_kernel, c.gradient, c.dtype, c.ldg,
               static_cast<int>(c.classes), is_vector(c.gradient, c.ldg, c.dtype), c.upstream, c.per_row);
}

}  // namespace pycompress::kd_loss
