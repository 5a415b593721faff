// The only place where an integer becomes a pointer. Python validates tensors and passes data_ptr() values.
#pragma once
#include <cstdint>

namespace pycompress {

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

}  // namespace pycompress
