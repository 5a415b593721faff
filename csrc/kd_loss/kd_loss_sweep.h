// The sweeps of kd_loss, written once over a vector type V. An ISA file includes this inside its target region, within
// its own anonymous namespace, so that every copy belongs to that file alone.
//
// V has: R, kLanes, kBounded (exp2 needs a range check), load, store, load_part, store_part, set, add, sub, mul, div, max, min,
// fms(a, b, c) = a * b - c rounded once, fma and fnma(a, b, c) = c - a * b (rounded once or twice), exp2<N>(R*), split (mantissa and
// exponent), select_positive(x, v) = x > 0 ? v : 0, select_less(a, b, v, w) = a < b ? v : w, reduce_add, reduce_max. No include here: the
// region is open.

template <class V>
PC_INLINE typename V::R load_some(const float* p, int64_t left, bool whole) {
  return whole ? V::load(p) : V::load_part(p, left, kHole);
}

template <class V>
PC_INLINE void store_some(float* p, typename V::R x, int64_t left, bool whole) {
  if (whole)
    V::store(p, x);
  else
    V::store_part(p, left, x);
}

// log2(x) for normal x > 0, NaN for NaN and infinity: the series of log(1 + f) of Cephes' logf (f in [sqrt(1/2) - 1, sqrt(2) - 1]), exact
// at 1.
template <class V>
PC_INLINE typename V::R log2_of(typename V::R x) {
  using R = typename V::R;
  R e;
  const R f = V::sub(V::split(x, &e), V::set(1.0f)), ff = V::mul(f, f);
  R p = V::set(7.0376836292e-2f);
  p = V::fma(p, f, V::set(-1.1514610310e-1f));
  p = V::fma(p, f, V::set(1.1676998740e-1f));
  p = V::fma(p, f, V::set(-1.2420140846e-1f));
  p = V::fma(p, f, V::set(1.4249322787e-1f));
  p = V::fma(p, f, V::set(-1.6668057665e-1f));
  p = V::fma(p, f, V::set(2.0000714765e-1f));
  p = V::fma(p, f, V::set(-2.4999993993e-1f));
  p = V::fma(p, f, V::set(3.3333331174e-1f));
  p = V::fma(V::mul(ff, f), p, V::mul(ff, V::set(-0.5f)));
  return V::fma(V::add(p, f), V::set(kLog2e), V::add(e, V::sub(x, x)));
}

template <class V>
struct Sums {
  typename V::R s, t, one, cross, max_s, max_t;
};

template <class V, Soft soft, Hard hard, bool careful, bool whole>
PC_INLINE void sweep_step(const Sweep& b, int64_t i, Sums<V>& sums) {
  using R = typename V::R;
  constexpr bool own = hard == Hard::own;
  const int64_t left = b.n - i;
  const R s = load_some<V>(b.s + i, left, whole), t = load_some<V>(b.t + i, left, whole);
  R y[own ? 3 : 2];
  y[0] = V::fms(s, V::set(b.cs), V::set(b.ds));
  y[1] = V::fms(t, V::set(b.ct), V::set(b.dt));
  if constexpr (own) y[2] = V::fms(s, V::set(b.c1), V::set(b.d1));
  R difference{};
  if constexpr (soft == Soft::forward) difference = V::sub(y[1], y[0]);
  if constexpr (soft == Soft::reverse) difference = V::sub(y[0], y[1]);
  if constexpr (V::kBounded) {
    sums.max_s = V::max(sums.max_s, s);
    sums.max_t = V::max(sums.max_t, t);
  }
  V::template exp2<own ? 3 : 2>(y);
  store_some<V>(b.x0 + i, y[0], left, whole);
  sums.s = V::add(sums.s, y[0]);
  sums.t = V::add(sums.t, y[1]);
  if constexpr (soft == Soft::forward) {
    if constexpr (careful) difference = V::select_positive(y[1], difference);
    sums.cross = V::fma(y[1], difference, sums.cross);
  }
  if constexpr (soft == Soft::reverse) {
    if constexpr (careful) difference = V::select_positive(y[0], difference);
    const R w = V::mul(y[0], difference);
    sums.cross = V::add(sums.cross, w);
    store_some<V>(b.x1 + i, w, left, whole);
  } else {
    store_some<V>(b.x1 + i, y[1], left, whole);
  }
  if constexpr (own) {
    sums.one = V::add(sums.one, y[2]);
    store_some<V>(b.x2 + i, y[2], left, whole);
  } else if constexpr (hard == Hard::square) {
    sums.one = V::fma(y[0], y[0], sums.one);
  } else if constexpr (hard == Hard::cube) {
    sums.one = V::fma(V::mul(y[0], y[0]), y[0], sums.one);
  } else if constexpr (hard == Hard::fourth) {
    const R square = V::mul(y[0], y[0]);
    sums.one = V::fma(square, square, sums.one);
  }
}

constexpr float kMaxExponent = 64.0f;

template <class V, Soft soft, Hard hard, bool careful>
void sweep(Sweep& result) {
  const Sweep b = result;  // a copy that no store can change, so that its fields stay in registers
  const typename V::R zero = V::set(0.0f), low = V::set(kHole);
  Sums<V> sums = {zero, zero, zero, zero, low, low};
  int64_t i = 0;
  for (; i + V::kLanes <= b.n; i += V::kLanes) {
    // One block ahead: the hardware's own prefetcher stops at the end of a page, which is a block.
    V::prefetch(b.s + i + kBlock);
    V::prefetch(b.t + i + kBlock);
    sweep_step<V, soft, hard, careful, true>(b, i, sums);
  }
  if (i < b.n) sweep_step<V, soft, hard, careful, false>(b, i, sums);
  result.sum_s = V::reduce_add(sums.s);
  result.sum_t = V::reduce_add(sums.t);
  result.sum_1 = hard == Hard::none ? 0.0f : V::reduce_add(sums.one);
  result.cross = soft == Soft::plain ? 0.0f : V::reduce_add(sums.cross);
  if constexpr (V::kBounded) {
    const float top = V::reduce_max(sums.max_s);
    if (b.cs * top - b.ds > kMaxExponent || (hard == Hard::own && b.c1 * top - b.d1 > kMaxExponent)) result.sum_s = kInfinity;
    if (b.ct * V::reduce_max(sums.max_t) - b.dt > kMaxExponent) result.sum_t = kInfinity;
  }
}

template <class V, bool whole>
PC_INLINE void sweep_one_step(const Sweep& b, int64_t i, Sums<V>& sums) {
  const int64_t left = b.n - i;
  const typename V::R s = load_some<V>(b.s + i, left, whole);
  typename V::R y[1] = {V::fms(s, V::set(b.cs), V::set(b.ds))};
  if constexpr (V::kBounded) sums.max_s = V::max(sums.max_s, s);
  V::template exp2<1>(y);
  sums.s = V::add(sums.s, y[0]);
  store_some<V>(b.x0 + i, y[0], left, whole);
}

template <class V>
void sweep_one(Sweep& result) {
  const Sweep b = result;
  const typename V::R zero = V::set(0.0f), low = V::set(kHole);
  Sums<V> sums = {zero, zero, zero, zero, low, low};
  int64_t i = 0;
  for (; i + V::kLanes <= b.n; i += V::kLanes) {
    V::prefetch(b.s + i + kBlock);
    sweep_one_step<V, true>(b, i, sums);
  }
  if (i < b.n) sweep_one_step<V, false>(b, i, sums);
  result.sum_s = V::reduce_add(sums.s);
  if constexpr (V::kBounded)
    if (b.cs * V::reduce_max(sums.max_s) - b.ds > kMaxExponent) result.sum_s = kInfinity;
}

// q log2(q / m) and p log2(p / m) out of p, q and `ratio` = log2 p - log2 q. With a the larger of p and q and b the other,
// m / a = 1 + w (b / a - 1) where w is the weight of b in m: no cancellation where p is close to q, and 0 where they are equal.
template <class V>
PC_INLINE void mix_terms(typename V::R p, typename V::R q, typename V::R ratio, float beta, typename V::R* from_p, typename V::R* from_q) {
  using R = typename V::R;
  const R zero = V::set(0.0f), one = V::set(1.0f);
  const R large = V::max(V::set(1.1754944e-38f), V::max(p, q)), quotient = V::div(V::min(p, q), large);
  const R weight = V::select_less(p, q, V::set(beta), V::set(1.0f - beta));
  const R log_m = log2_of<V>(V::fma(weight, V::sub(quotient, one), one));  // log2(m / a)
  // min takes its second operand where one is NaN, so a NaN ratio stays.
  *from_p = V::mul(p, V::select_positive(p, V::sub(V::min(zero, ratio), log_m)));
  *from_q = V::mul(q, V::select_positive(q, V::sub(V::min(zero, V::sub(zero, ratio)), log_m)));
}

template <class V, bool whole>
PC_INLINE void mix_step(const Mix& b, int64_t i, typename V::R& sum_p, typename V::R& sum_q) {
  using R = typename V::R;
  const int64_t left = b.n - i;
  const R ys = V::fms(load_some<V>(b.s + i, left, whole), V::set(b.cs), V::set(b.ds));
  const R yt = V::fms(load_some<V>(b.t + i, left, whole), V::set(b.ct), V::set(b.dt));
  const R q = V::mul(whole ? V::load(b.x0 + i) : V::load_part(b.x0 + i, left, 0.0f), V::set(b.factor_s));
  const R p = V::mul(whole ? V::load(b.x1 + i) : V::load_part(b.x1 + i, left, 0.0f), V::set(b.factor_t));
  R from_p, from_q;
  mix_terms<V>(p, q, V::add(V::sub(yt, ys), V::set(b.shift)), b.beta, &from_p, &from_q);
  sum_p = V::add(sum_p, from_p);
  sum_q = V::add(sum_q, from_q);
  store_some<V>(b.x1 + i, from_q, left, whole);
}

template <class V>
void mix(Mix& result) {
  const Mix b = result;
  typename V::R sum_p = V::set(0.0f), sum_q = sum_p;
  int64_t i = 0;
  for (; i + V::kLanes <= b.n; i += V::kLanes) mix_step<V, true>(b, i, sum_p, sum_q);
  if (i < b.n) mix_step<V, false>(b, i, sum_p, sum_q);
  result.sum_p = V::reduce_add(sum_p);
  result.sum_q = V::reduce_add(sum_q);
}

template <class V, bool pair, Hard hard, bool whole>
PC_INLINE void combine_step(const Combine& b, int64_t i) {
  using R = typename V::R;
  const int64_t left = b.n - i;
  const R x0 = load_some<V>(b.x0 + i, left, whole), a = V::set(b.a), k = V::set(b.k);
  R g;
  if constexpr (hard == Hard::none) {
    g = V::mul(a, x0);
    // Two products and a difference, no fma: equal models give exactly 0.
    if constexpr (pair) g = V::sub(g, V::mul(V::set(b.b), load_some<V>(b.x1 + i, left, whole)));
    g = V::add(g, k);
  } else {
    if constexpr (hard == Hard::own) {
      g = V::fma(V::set(b.c), load_some<V>(b.x2 + i, left, whole), V::fma(a, x0, k));
    } else {  // (a + c x0^(T - 1)) x0
      R power = x0;
      if constexpr (hard != Hard::square) power = V::mul(power, x0);
      if constexpr (hard == Hard::fourth) power = V::mul(power, x0);
      g = V::fma(V::fma(V::set(b.c), power, a), x0, k);
    }
    if constexpr (pair) g = V::fnma(V::set(b.b), load_some<V>(b.x1 + i, left, whole), g);
  }
  store_some<V>(b.out + i, g, left, whole);
}

template <class V, bool pair, Hard hard>
void combine(const Combine& argument) {
  const Combine b = argument;
  int64_t i = 0;
  for (; i + V::kLanes <= b.n; i += V::kLanes) combine_step<V, pair, hard, true>(b, i);
  if (i < b.n) combine_step<V, pair, hard, false>(b, i);
}

// Small rows: one row per lane, so that nothing is reduced across a vector and the row's scalars are vectors too.
// soft: 0 none, 1 forward, 2 reverse, 3 jsd.
template <class V, int soft, bool hard>
void tile(const Tile& argument) {
  const Tile a = argument;
  using R = typename V::R;
  constexpr int L = V::kLanes;
  const R zero = V::set(0.0f), ln2 = V::set(0.69314718055994530942f);
  R max_s = V::load(a.s), max_t = soft ? V::load(a.t) : zero, plain_sum = zero;
  for (int64_t j = 1; j < a.classes; ++j) {
    max_s = V::max(max_s, V::load(a.s + j * L));
    if constexpr (soft != 0) max_t = V::max(max_t, V::load(a.t + j * L));
  }
  const R cs = V::set(a.cs), ct = V::set(a.ct), c1 = V::set(kLog2e);
  const R ds = V::mul(cs, max_s), dt = V::mul(ct, max_t), d1 = V::mul(c1, max_s);
  R sum_s = zero, sum_t = zero, sum_1 = zero, cross = zero;
  for (int64_t j = 0; j < a.classes; ++j) {
    const R s = V::load(a.s + j * L);
    R y[3];
    if constexpr (soft != 0) {
      y[0] = V::fms(s, cs, ds);
      y[1] = V::fms(V::load(a.t + j * L), ct, dt);
      if constexpr (hard) y[2] = V::fms(s, c1, d1);
      R difference = soft == 2 ? V::sub(y[0], y[1]) : V::sub(y[1], y[0]);
      V::template exp2<hard ? 3 : 2>(y);
      sum_s = V::add(sum_s, y[0]);
      sum_t = V::add(sum_t, y[1]);
      if constexpr (soft == 1) cross = V::fma(y[1], V::select_positive(y[1], difference), cross);
      R second = y[1];
      if constexpr (soft == 2) {
        second = V::mul(y[0], V::select_positive(y[0], difference));
        cross = V::add(cross, second);
      }
      V::store(a.x0 + j * L, y[0]);
      V::store(a.x1 + j * L, second);
    } else {
      y[2] = V::fms(s, c1, d1);
      V::template exp2<1>(y + 2);
    }
    if constexpr (hard) {
      sum_1 = V::add(sum_1, y[2]);
      plain_sum = V::add(plain_sum, s);
      V::store(a.x2 + j * L, y[2]);
    }
  }
  const R one = V::set(1.0f);
  R loss = zero, factor_s = zero, factor_t = zero, shift = zero;
  R a0 = zero, b1 = zero;  // gradient of the soft term: a0 * x0 - b1 * x1
  const R scale = V::load(a.scale), soft_scale = V::mul(scale, V::set(a.soft_gradient));
  if constexpr (soft != 0) {
    factor_s = V::div(one, sum_s);
    factor_t = V::div(one, sum_t);
    // log2(sum_s / sum_t), also the offset that turns yt - ys into log2 p - log2 q
    shift = log2_of<V>(V::div(sum_s, sum_t));
  }
  if constexpr (soft == 1) {
    loss = V::fma(cross, factor_t, shift);
    a0 = V::mul(soft_scale, factor_s);
    b1 = V::mul(soft_scale, factor_t);
  } else if constexpr (soft == 2) {
    loss = V::sub(V::mul(cross, factor_s), shift);
    const R common = V::mul(V::mul(soft_scale, factor_s), ln2);
    a0 = V::mul(common, V::sub(V::sub(zero, shift), loss));
    b1 = V::sub(zero, common);
  } else if constexpr (soft == 3) {
    R sum_p = zero, sum_q = zero;
    for (int64_t j = 0; j < a.classes; ++j) {
      const R ys = V::fms(V::load(a.s + j * L), cs, ds), yt = V::fms(V::load(a.t + j * L), ct, dt);
      const R p = V::mul(V::load(a.x1 + j * L), factor_t), q = V::mul(V::load(a.x0 + j * L), factor_s);
      R from_p, from_q;
      mix_terms<V>(p, q, V::add(V::sub(yt, ys), shift), a.beta, &from_p, &from_q);
      sum_p = V::add(sum_p, from_p);
      sum_q = V::add(sum_q, from_q);
      V::store(a.x1 + j * L, from_q);
    }
    loss = V::add(V::mul(V::set(a.beta), sum_p), V::mul(V::set(1.0f - a.beta), sum_q));
    const R common = V::mul(soft_scale, ln2);
    a0 = V::sub(zero, V::mul(V::mul(common, factor_s), sum_q));
    b1 = V::sub(zero, common);
  }
  if constexpr (soft != 0) loss = V::mul(loss, V::set(a.soft));
  R c2 = zero, k = zero;
  if constexpr (hard) {
    // ln2 * (log2 of the sum, against the label's exponent)
    const R log_sum = log2_of<V>(sum_1);
    R entropy = V::mul(ln2, V::sub(log_sum, V::fms(V::load(a.label_logit), c1, d1)));
    if (a.smoothing > 0.0f) {
      const R mean = V::div(plain_sum, V::set(static_cast<float>(a.classes)));
      const R uniform = V::mul(ln2, V::sub(log_sum, V::fms(mean, c1, d1)));
      entropy = V::add(V::mul(entropy, V::set(1.0f - a.smoothing)), V::mul(uniform, V::set(a.smoothing)));
    }
    loss = V::fma(entropy, V::set(a.hard), loss);
    const R hard_scale = V::mul(scale, V::set(a.hard));
    c2 = V::div(hard_scale, sum_1);
    k = V::mul(hard_scale, V::set(-a.smoothing / static_cast<float>(a.classes)));
  }
  V::store(a.loss, loss);
  if (!a.gradient) return;
  for (int64_t j = 0; j < a.classes; ++j) {
    R g = zero;
    if constexpr (soft != 0) g = V::sub(V::mul(a0, V::load(a.x0 + j * L)), V::mul(b1, V::load(a.x1 + j * L)));
    if constexpr (hard) g = V::add(g, V::fma(c2, V::load(a.x2 + j * L), k));
    V::store(a.x0 + j * L, g);
  }
}

// A NaN may be dropped: the sums of its row are NaN anyway.
template <class V>
float max_of(const float* x, int64_t n) {
  typename V::R best = V::set(-kInfinity);
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) best = V::max(best, V::load(x + i));
  if (i < n) best = V::max(best, V::load_part(x + i, n - i, -kInfinity));
  return V::reduce_max(best);
}

template <class V>
double sum_of(const float* x, int64_t n) {
  typename V::R sum = V::set(0.0f);
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) sum = V::add(sum, V::load(x + i));
  if (i < n) sum = V::add(sum, V::load_part(x + i, n - i, 0.0f));
  return V::reduce_add(sum);
}

template <class V>
PC_INLINE typename V::R log2_checked(typename V::R x) {
  const typename V::R zero = V::set(0.0f);
  const typename V::R y = V::select_less(x, V::set(1.1754944e-38f), V::set(-kInfinity), log2_of<V>(x));
  return V::select_less(x, zero, V::set(kNaN), y);
}

template <class V>
void log2_row(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store(x + i, log2_checked<V>(V::load(x + i)));
  if (i < n) V::store_part(x + i, n - i, log2_checked<V>(V::load_part(x + i, n - i, 1.0f)));
}

#define PC_KD_HARD(soft, hard) {sweep<V, soft, hard, false>, sweep<V, soft, hard, true>}
#define PC_KD_SOFT(soft)                                                                                                   \
  PC_KD_HARD(soft, Hard::none), PC_KD_HARD(soft, Hard::own), PC_KD_HARD(soft, Hard::square), PC_KD_HARD(soft, Hard::cube), \
      PC_KD_HARD(soft, Hard::fourth)
// The function tables of a record, for vector type V.
#define PC_KD_TABLES                                                                                                                   \
  void (*const kSweeps[][2])(Sweep&) = {PC_KD_SOFT(Soft::forward), PC_KD_SOFT(Soft::reverse), PC_KD_SOFT(Soft::plain)};                \
  void (*const kCombines[])(const Combine&) = {                                                                                        \
      combine<V, false, Hard::none>,   combine<V, false, Hard::own>,  combine<V, false, Hard::square>, combine<V, false, Hard::cube>,  \
      combine<V, false, Hard::fourth>, combine<V, true, Hard::none>,  combine<V, true, Hard::own>,     combine<V, true, Hard::square>, \
      combine<V, true, Hard::cube>,    combine<V, true, Hard::fourth>};                                                                \
  void (*const kTiles[][2])(const Tile&) = {{tile<V, 0, true>, tile<V, 0, true>},                                                      \
                                            {tile<V, 1, false>, tile<V, 1, true>},                                                     \
                                            {tile<V, 2, false>, tile<V, 2, true>},                                                     \
                                            {tile<V, 3, false>, tile<V, 3, true>}};
