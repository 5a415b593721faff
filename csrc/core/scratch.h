// Per-thread scratch memory that grows and stays: kernels are called thousands of times a second.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

namespace pycompress {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // 64-byte aligned, at least `bytes` long; contents are undefined. Throws std::bad_alloc.
  void* get(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = ::operator new(bytes, std::align_val_t{64});
      size_ = bytes;
    }
    return data_;
  }
  template <class T>
  T* get(size_t count) {
    return static_cast<T*>(get(count * sizeof(T)));
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr, size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace pycompress
