// Compares every kernel that this machine runs with the scalar one, or with plain loops, without Python.
//
// All buffers have exactly the size the contract asks for, and each case runs on a thread of its own, so that the scratch memory of
// the library (one per thread, growing) starts empty: AddressSanitizer sees the first byte too far.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "core/dispatch.h"
#include "core/types.h"

namespace parity {

struct Suite {
  Suite(const char* name, void (*run)());  // registers itself; main() runs all
  const char* name;
  void (*run)();
};

// Prints a failure (the first few of them) and lets main() return 1.
void expect(bool ok, const std::string& what);

// Elements on the heap, not one more than asked for.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count), data_(static_cast<T*>(::operator new(bytes(), std::align_val_t{64}))) {
    std::memset(static_cast<void*>(data_), 0x5a, bytes());
  }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : count_(other.count_), data_(other.data_) { other.count_ = 0, other.data_ = nullptr; }
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_) ::operator delete(data_, std::align_val_t{64});
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }

 private:
  int64_t count_;
  T* data_;
};

// splitmix64: the same numbers everywhere, unlike std::normal_distribution.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int8_t i8() { return static_cast<int8_t>(below(256) - 128); }
  float uniform(float low, float high) { return low + (high - low) * (static_cast<float>(next() >> 40) * 0x1p-24f); }

 private:
  uint64_t state_;
};

inline constexpr pycompress::Activation kActivations[] = {pycompress::Activation::none,  pycompress::Activation::relu,
                                                          pycompress::Activation::gelu,  pycompress::Activation::silu,
                                                          pycompress::Activation::relu6, pycompress::Activation::hardswish};

// Runs body() on a new thread and waits.
template <class Body>
void fresh(const Body& body) {
  std::thread(body).join();
}

// Kernels of a list that this CPU runs, best first; the last one is scalar. Prints their names.
template <class Kernel>
std::vector<const Kernel*> usable(const char* op, const pycompress::KernelList<Kernel>& list) {
  std::vector<const Kernel*> out;
  std::printf("%s kernels:", op);
  for (const Kernel* k : list)
    if (pycompress::isa_available(k->isa)) {
      out.push_back(k);
      std::printf(" %s", k->name);
    }
  std::printf("\n");
  return out;
}

// Largest |a - b| / max(1, |b|); infinite where only one of them is NaN, or both are different infinities.
double difference(const float* a, const float* b, int64_t count);
bool same_bits(const float* a, const float* b, int64_t count);  // any NaN equals any NaN

}  // namespace parity
