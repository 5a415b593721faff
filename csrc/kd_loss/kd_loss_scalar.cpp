// Plain C++: a vector of 4 floats in loops that any compiler can vectorise for its baseline. No fma there, so products that
// must be rounded once go through double.
#include <cmath>
#include <cstring>

#include "core/float_rows.h"
#include "kd_loss/kd_loss.h"

namespace pycompress::kd_loss {
namespace {

struct V {
  static constexpr int kLanes = 4;
  static constexpr bool kBounded = true;  // beyond 2^127 the exponent bits wrap
  struct R {
    float v[kLanes];
  };

  template <class F>
  static PC_INLINE R map(F f) {
    R r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
    return r;
  }
  static PC_INLINE R load(const float* p) {
    return map([=](int i) { return p[i]; });
  }
  static PC_INLINE void store(float* p, R x) {
    for (int i = 0; i < kLanes; ++i) p[i] = x.v[i];
  }
  static PC_INLINE R load_part(const float* p, int64_t n, float fill) {
    return map([=](int i) { return i < n ? p[i] : fill; });
  }
  static PC_INLINE void store_part(float* p, int64_t n, R x) {
    for (int64_t i = 0; i < n; ++i) p[i] = x.v[i];
  }
  static PC_INLINE void prefetch(const float*) {}
  static PC_INLINE R set(float x) {
    return map([=](int) { return x; });
  }
  static PC_INLINE R add(R a, R b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  static PC_INLINE R sub(R a, R b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  static PC_INLINE R mul(R a, R b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  static PC_INLINE R div(R a, R b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  static PC_INLINE R max(R a, R b) {  // b where one is NaN
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static PC_INLINE R min(R a, R b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static PC_INLINE R fma(R a, R b, R c) {
    return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static PC_INLINE R fnma(R a, R b, R c) {
    return map([&](int i) { return c.v[i] - a.v[i] * b.v[i]; });
  }
  static PC_INLINE R fms(R a, R b, R c) {
    return map([&](int i) { return static_cast<float>(static_cast<double>(a.v[i]) * b.v[i] - c.v[i]); });
  }
  static PC_INLINE uint32_t bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
  }
  static PC_INLINE float from_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }

  // Exactly 0 at and below 2^-127, where polynomial and exponent bits both are.
  template <int N>
  static PC_INLINE void exp2(R* y) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: the integer nearest to y ends in the low bits
    for (int i = 0; i < N; ++i) {
      y[i] = max(set(-127.0f), y[i]);
      const R k = add(y[i], set(magic)), r = sub(y[i], sub(k, set(magic)));
      R p = fma(set(1.326472731e-3f), r, set(9.671512991e-3f));
      p = fma(p, r, set(5.550733581e-2f));
      p = fma(p, r, set(2.402224243e-1f));
      p = fma(p, r, set(6.931470037e-1f));
      p = fma(p, r, set(1.0f));
      y[i] = map([&](int j) { return from_bits(bits(p.v[j]) + (bits(k.v[j]) << 23)); });
    }
  }

  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  static PC_INLINE R split(R x, R* e) {
    R m;
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t u = bits(x.v[i]);
      const int32_t k = static_cast<int32_t>(u - 0x3f3504f3u) >> 23;
      e->v[i] = static_cast<float>(k);
      m.v[i] = from_bits(u - (static_cast<uint32_t>(k) << 23));
    }
    return m;
  }
  static PC_INLINE R select_positive(R x, R v) {
    return map([&](int i) { return x.v[i] <= 0.0f ? 0.0f : v.v[i]; });
  }
  static PC_INLINE R select_less(R a, R b, R v, R w) {
    return map([&](int i) { return a.v[i] < b.v[i] ? v.v[i] : w.v[i]; });
  }
  static PC_INLINE float reduce_add(R x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }
  static PC_INLINE float reduce_max(R x) {
    float best = x.v[0];
    for (int i = 1; i < kLanes; ++i) best = best > x.v[i] ? best : x.v[i];
    return best;
  }
};

#include "kd_loss/kd_loss_sweep.h"

PC_KD_TABLES

}  // namespace

extern const Kernel kScalar;
const Kernel kScalar = {"scalar", Isa::scalar, V::kLanes, kSweeps,     sweep_one<V>, mix<V>,    kCombines,
                        kTiles,   max_of<V>,   sum_of<V>, log2_row<V>, widen_row,    narrow_row};

}  // namespace pycompress::kd_loss
