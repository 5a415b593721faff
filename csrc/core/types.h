// Small types shared by every op. Baseline code only: no SIMD, no torch, no Python.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pycompress {

// Element types that cross the binding as small integers; pycompress/ops/native.py has the same table.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Activation functions that an epilogue may apply. gelu is the exact one (erf), as torch's default; hardswish is y relu6(y + 3) / 6.
enum class Activation : int { none = 0, relu = 1, gelu = 2, silu = 3, relu6 = 4, hardswish = 5 };

// return function<activation>(...), for tiles that are compiled once per activation
#define PC_WITH_ACTIVATION(activation, function, ...)      \
  switch (activation) {                                    \
    case Activation::none:                                 \
      return function<Activation::none>(__VA_ARGS__);      \
    case Activation::relu:                                 \
      return function<Activation::relu>(__VA_ARGS__);      \
    case Activation::gelu:                                 \
      return function<Activation::gelu>(__VA_ARGS__);      \
    case Activation::silu:                                 \
      return function<Activation::silu>(__VA_ARGS__);      \
    case Activation::relu6:                                \
      return function<Activation::relu6>(__VA_ARGS__);     \
    case Activation::hardswish:                            \
      return function<Activation::hardswish>(__VA_ARGS__); \
  }

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Size, a multiple of `unit`, of equal blocks of `count` things, at most `limit` (a multiple of it, too) each and as many for every thread.
inline constexpr int64_t even_block(int64_t count, int64_t limit, int64_t threads, int64_t unit) {
  return round_up(ceil_div(count, round_up(ceil_div(count, limit), threads)), unit);
}

}  // namespace pycompress
