// The one-dimensional transforms of F(4x4, 3x3) in scaled integers (winograd.cpp), for vectors of any type T with +, - and
// shl<n>(). Included inside the target region and the anonymous namespace of a kernel file. No include guard on purpose.

// v = B' d, |v| <= 10 max|d|
template <class T>
PC_INLINE void input_transform(const T* d, T* v, int step) {
  const T c = d[4] - d[2], e = (d[3] - d[1]).template shl<1>();
  const T a = d[4] - d[2].template shl<2>(), b = d[3] - d[1].template shl<2>();
  v[0] = c + (d[0] - d[2]).template shl<2>();
  v[step] = a + b;
  v[2 * step] = a - b;
  v[3 * step] = c + e;
  v[4 * step] = c - e;
  v[5 * step] = (d[5] - d[3]) - e.template shl<1>();
}

// u = diag(4, -6, -6, 24, 24, 1) G g, |u| <= 7 max|g|
template <class T>
PC_INLINE void weight_transform(T g0, T g1, T g2, T* u, int step) {
  const T s = g0 + g2, p = g0 + g2.template shl<2>(), q = g1.template shl<1>();
  u[0] = g0;
  u[step] = s + g1;
  u[2 * step] = s - g1;
  u[3 * step] = p + q;
  u[4 * step] = p - q;
  u[5 * step] = g2;
}

// y = 24 A' diag(1/4, -1/6, -1/6, 1/24, 1/24, 1) m
template <class T>
PC_INLINE void output_transform(const T* m, T* y, int step) {
  const T s = (m[1] + m[2]).template shl<2>(), d = (m[1] - m[2]).template shl<2>(), p = m[3] + m[4], q = m[3] - m[4];
  const T m5 = m[5].template shl<3>();
  y[0] = m[0].template shl<2>() + m[0].template shl<1>() + p - s;
  y[step] = q.template shl<1>() - d;
  y[2 * step] = p.template shl<2>() - s;
  y[3 * step] = q.template shl<3>() - d + m5 + m5.template shl<1>();
}

// 1 / 9 modulo 2^32: 9 * 0x38e38e39 = 2 * 2^32 + 1
constexpr int32_t kNinth = 0x38e38e39;
