// Division of indices by a number that is known at the launch: a multiplication and a shift instead of some twenty instructions.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pycompress::cuda {

// n / divisor and n % divisor for 0 <= n < 2^31 and 1 <= divisor < 2^31 (Granlund & Montgomery, "Division by invariant integers using
// multiplication", 1994, figure 4.1; there the sum below could overflow, here n has 31 bits).
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
  }
  __host__ __device__ __forceinline__ int divide(int n) const {
    const uint32_t u = static_cast<uint32_t>(n), high = static_cast<uint32_t>(static_cast<uint64_t>(u) * multiplier >> 32);
    return static_cast<int>((high + u) >> shift);
  }
  __host__ __device__ __forceinline__ int divide(int n, int& rest) const {
    const int quotient = divide(n);
    rest = n - quotient * static_cast<int>(divisor);
    return quotient;
  }
};

}  // namespace pycompress::cuda
