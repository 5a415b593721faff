// Where a kernel runs, as Python hands it over. Plain C++: bindings include it.
#pragma once

namespace pycompress::cuda {

struct Stream {
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
};

}  // namespace pycompress::cuda
