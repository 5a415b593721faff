// Loops over float rows for every instruction set, written once. Included inside the target region and the anonymous namespace
// of a kernel file (so no copy of them is left for the linker to pick), after a struct F with
//   reg, lanes, load, load_first(p, n), store, store_first(p, n, v), set, fma(a, b, c) = a * b + c rounded once, mac (the same, exact
//   numbers only), add, mul, min, max, round, activate
// where n counts the elements of a partial vector. No include guard and no includes on purpose.

template <class Body>
PC_INLINE void for_vectors(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + F::lanes <= n; i += F::lanes) body(i, F::lanes);
  if (i < n) body(i, static_cast<int>(n - i));
}
PC_INLINE F::reg load_n(const float* p, int n) { return n == F::lanes ? F::load(p) : F::load_first(p, n); }
PC_INLINE void store_n(float* p, int n, F::reg v) { n == F::lanes ? F::store(p, v) : F::store_first(p, n, v); }

void activate_run(float* y, int64_t n, Activation activation) {
  for_vectors(n, [=](int64_t i, int count) PC_LAMBDA_INLINE { store_n(y + i, count, F::activate(load_n(y + i, count), activation)); });
}

float round_row(const float* x, int64_t n, float inverse, float lo, float hi, float* dst) {
  const F::reg inv = F::set(inverse), low = F::set(lo), high = F::set(hi), zero = F::set(0.0f);
  F::reg bad = zero;
  for_vectors(n, [&](int64_t i, int count) PC_LAMBDA_INLINE {
    const F::reg v = load_n(x + i, count);
    bad = F::mac(v, zero, bad);  // 0, but NaN for NaN and Inf
    store_n(dst + i, count, F::round(F::min(F::max(F::mul(v, inv), low), high)));
  });
  float lanes[F::lanes], sum = 0.0f;
  F::store(lanes, bad);
  for (float v : lanes) sum += v;
  return sum;
}

void add_f32(float* y, const float* residual, int64_t n, Activation activation) {
  for_vectors(n, [=](int64_t i, int count) PC_LAMBDA_INLINE {
    store_n(y + i, count, F::activate(F::add(load_n(y + i, count), load_n(residual + i, count)), activation));
  });
}

void add_i8(float* y, const int8_t* residual, int64_t n, float scale, int zero_point, Activation activation) {
  for (int64_t i = 0; i < n; ++i) {
    const float r = static_cast<float>(residual[i] - zero_point) * scale;
    y[i] += r;
  }
  if (activation != Activation::none) activate_run(y, n, activation);
}

template <class Operand>
void center(const void* operands, int64_t n, int correction, float* dst) {  // compilers make vectors of it
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(static_cast<const Operand*>(operands)[i] - correction);
}

template <int kTaps>
PC_INLINE void plane_rows(const float* const* taps, const float* w, int64_t count, int64_t rows, int64_t cols, int64_t row_step,
                          float scale, float bias, bool relu, float* out, int64_t ldo) {
  const F::reg s = F::set(scale), b = F::set(bias), floor = F::set(0.0f);
  const int64_t n = kTaps ? kTaps : count;
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < cols; x += F::lanes) {
      F::reg sum = F::set(0.0f);
      PC_UNROLL
      for (int64_t t = 0; t < n; ++t) sum = F::mac(F::load(taps[t] + y * row_step + x), F::set(w[t]), sum);
      sum = F::fma(sum, s, b);
      F::store(out + y * ldo + x, relu ? F::max(floor, sum) : sum);
    }
  }
}

void depthwise_plane(const float* const* taps, const float* w, int64_t count, int64_t rows, int64_t cols, int64_t row_step, float scale,
                     float bias, Activation activation, float* out, int64_t ldo) {
  const bool relu = activation == Activation::relu;
  if (count == 9)
    plane_rows<9>(taps, w, count, rows, cols, row_step, scale, bias, relu, out, ldo);
  else
    plane_rows<0>(taps, w, count, rows, cols, row_step, scale, bias, relu, out, ldo);
  if (activation > Activation::relu)
    for (int64_t y = 0; y < rows; ++y) activate_run(out + y * ldo, cols, activation);
}

template <int kTaps>
PC_INLINE void pixel_vectors(const float* const* taps, const float* w, int64_t count, int64_t pixels, int64_t step, int64_t channels,
                             float image_scale, const float* scale, const float* bias, bool relu, float* out) {
  const int64_t n = kTaps ? kTaps : count;
  const F::reg floor = F::set(0.0f);
  for_vectors(channels, [&](int64_t c, int lanes) PC_LAMBDA_INLINE {
    const F::reg s = F::mul(F::set(image_scale), load_n(scale + c, lanes)), b = bias ? load_n(bias + c, lanes) : F::set(0.0f);
    F::reg held[kTaps ? kTaps : 1];
    PC_UNROLL
    for (int t = 0; t < kTaps; ++t) held[t] = load_n(w + t * channels + c, lanes);
    for (int64_t p = 0; p < pixels; ++p) {
      F::reg sum = F::set(0.0f);
      PC_UNROLL
      for (int64_t t = 0; t < n; ++t)
        sum = F::mac(load_n(taps[t] + p * step + c, lanes), kTaps ? held[kTaps ? t : 0] : load_n(w + t * channels + c, lanes), sum);
      sum = F::fma(sum, s, b);
      store_n(out + p * channels + c, lanes, relu ? F::max(floor, sum) : sum);
    }
  });
}

void depthwise_pixels(const float* const* taps, const float* w, int64_t count, int64_t pixels, int64_t step, int64_t channels,
                      float image_scale, const float* scale, const float* bias, Activation activation, float* out) {
  const bool relu = activation == Activation::relu;
  if (count == 9)
    pixel_vectors<9>(taps, w, count, pixels, step, channels, image_scale, scale, bias, relu, out);
  else
    pixel_vectors<0>(taps, w, count, pixels, step, channels, image_scale, scale, bias, relu, out);
  if (activation > Activation::relu) activate_run(out, pixels * channels, activation);
}
