// kd_loss on a CUDA device: the same arguments with device addresses, and where the kernel runs. Nothing here waits for the device.
//
// A row is read once: one block, or a cluster of blocks on sm_90, holds the student's and the teacher's logits in shared memory
// between the sweep for the sums and the one that writes the gradient. Where they do not fit (`on_chip` false), the sweeps read
// them again. What the CPU refuses by looking at values (a label, id or weight out of range) makes its row NaN here, because
// looking would stall the stream.
#pragma once
#include "kd_loss/kd_loss.h"

namespace pycompress::kd_loss {

inline constexpr int kCudaChunk = 8;  // neighbouring classes that one thread works on
inline constexpr int kCudaMaxThreads = 256;

struct CudaCall {
  Args args;        // addresses on the device; check() was not called. `denominator` is not used
  float* row_loss;  // (rows): the loss itself for Reduction::none
  float* scale;     // one value: 1 / denominator. Written first for Reduction::mean, unless `scale_given`
  bool scale_given;
  int threads;  // per block, a multiple of 32
  int cluster;  // blocks per row: 1, or up to 8 on sm_90
  bool on_chip;
  int device;
  void* stream;
};

// Dynamic shared memory of a block.
int64_t cuda_shared_bytes(const Args& args, int cluster, bool on_chip);

// Throws std::runtime_error if the launch fails.
void run_cuda(const CudaCall& call);

// Multiplies a gradient with what comes from upstream: one value, or one per row. Reads no gradient where it is 1.
struct ScaleCall {
  int64_t rows, classes, ldg;
  void* gradient;
  DType dtype;
  const float* upstream;
  bool per_row;
  int device;
  void* stream;
};
void scale_cuda(const ScaleCall& call);

}  // namespace pycompress::kd_loss
