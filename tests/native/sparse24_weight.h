// A random N:4 sparse weight in the canonical format, for the suites of both sparse ops.
#pragma once
#include "parity.h"

namespace parity {

template <class T>
struct SparseWeight {
  int64_t n, k, kept;
  Buffer<T> values;
  Buffer<uint8_t> indices;

  int64_t count() const { return (k + 3) / 4 * kept; }

  // value(random) gives a kept value; positions behind k hold 0.
  template <class Value>
  SparseWeight(int64_t n_, int64_t k_, int64_t kept_, Random& random, const Value& value)
      : n(n_), k(k_), kept(kept_), values(n_ * ((k_ + 3) / 4 * kept_)), indices(n_ * (((k_ + 3) / 4 * kept_ + 3) / 4)) {
    std::memset(indices.data(), 0, indices.bytes());
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < count(); i += kept) {
        const int64_t low = kept == 1 ? random.below(4) : random.below(3), high = low + 1 + random.below(3 - (kept == 1 ? 0 : low));
        for (int64_t j = 0; j < kept; ++j) {
          const int64_t position = j == 0 ? low : high, at = i / kept * 4 + position;
          values[r * count() + i + j] = at < k ? value(random) : T{0};
          uint8_t& byte = indices[r * ((count() + 3) / 4) + (i + j) / 4];
          byte = static_cast<uint8_t>(byte | position << 2 * ((i + j) % 4));
        }
      }
  }
};

}  // namespace parity
