#include "int8_matmul/int8_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"

namespace pycompress::int8_matmul {

extern const Kernel kScalar;
#if PC_X86
extern const Kernel kAvx2Bytes;
extern const Kernel kAvx512Vnni, kAvx512Vnni256;
#if PC_HAVE_AVX_VNNI
extern const Kernel kAvxVnni;
#endif
#elif PC_ARM64
extern const Kernel kNeon;
#if PC_HAVE_NEON_EXTENSIONS
extern const Kernel kNeonDotprod;
extern const Kernel kNeonI8mm;
#endif
#endif

const KernelList<Kernel>& kernels() {
  static const KernelList<Kernel> list = {
#if PC_X86
      &kAvx512Vnni, &kAvx512Vnni256,
#if PC_HAVE_AVX_VNNI
      &kAvxVnni,
#endif
      &kAvx2Bytes,
#elif PC_ARM64
#if PC_HAVE_NEON_EXTENSIONS
      &kNeonI8mm,
      &kNeonDotprod,
#endif
      &kNeon,
#endif
      &kScalar,
  };
  return list;
}

namespace {

// Rows of a that are packed at a time: half of a 1 MB L2 for the operand block, the rest for the panel of b. A smaller L2 does with it:
// a tile takes hundreds of cycles per KB of operands.
constexpr size_t kRowBlockBytes = 512 * 1024;

// ... and no more rows than this, so that with a small K the block's output stays in L2 while the panels pass. (240 is as fast with
// 256 columns and 3 % slower with 4096, whose rows lie in pages of their own.)
constexpr int64_t kMaxBlockRows = 120;

int64_t panel_columns(const Kernel& kr, int64_t n, int64_t j) { return round_up(std::min<int64_t>(kr.nr, n - j), kr.nv); }

// Where the column sums begin: behind the panels, aligned for int32.
int64_t panel_bytes(const Kernel& kernel, int64_t n, int64_t k) { return round_up(round_up(n, kernel.nv) * round_up(k, kernel.kr), 4); }

const int32_t* column_sums(const Kernel& kernel, const void* packed, int64_t n, int64_t k) {
  return reinterpret_cast<const int32_t*>(static_cast<const char*>(packed) + panel_bytes(kernel, n, k));
}

// Byte stride of a row in operand format: a cache line more than a power of two keeps mr rows out of one L1 set.
int64_t row_stride(const Kernel& kernel, int64_t k) {
  const int64_t bytes = round_up(round_up(k, kernel.kr) * kernel.a_size + kernel.row_extra, 64);
  return bytes % 1024 == 0 ? bytes + 64 : bytes;
}

int64_t rows_per_block(const Kernel& kernel, int64_t k) {
  const int64_t rows = std::min(kMaxBlockRows, static_cast<int64_t>(kRowBlockBytes) / row_stride(kernel, k));
  return std::max<int64_t>(kernel.mr, rows / kernel.mr * kernel.mr);
}

// What differs between matmul and linear: how a row becomes an operand, and where a finished tile goes.
struct Job {
  // Rows [m0, m1) as operands; `correction` is what the tile sums too much, in units of the column sum.
  virtual void load(int64_t m0, int64_t m1, char* rows, float* scales, int32_t* corrections) const = 0;
  virtual void store(int64_t m, int64_t j, int rows, int cols, const int32_t* acc, const float* row_scale,
                     const int32_t* correction) const = 0;
  // Products and store in one for whole panels of columns, or false.
  virtual bool fused(int64_t, int64_t, int64_t, int64_t, const char*, const int8_t*, const float*, const int32_t*) const { return false; }

 protected:
  ~Job() = default;
};

struct Shape {
  int64_t m, n, k;
};

// b that fits beside a few rows of a in L1 and L2: then the rows go outside and the output is written in order.
constexpr int64_t kSmallWeightBytes = 64 * 1024;

// Columns [j0, j1) (panel borders) of rows [m0, m1), whose operands are already in `rows`.
void compute(const Kernel& kernel, const Shape& s, const Job& job, const void* packed, int64_t m0, int64_t m1, int64_t j0, int64_t j1,
             const char* rows, const float* scales, const int32_t* corrections) {
  const int64_t kp = round_up(s.k, kernel.kr), stride = row_stride(kernel, s.k);
  const int8_t* b = static_cast<const int8_t*>(packed);
  if (job.fused(m0, m1 - m0, j0, j1, rows, b, scales, corrections)) return;
  alignas(64) int32_t acc[kMaxMr * kMaxNr];
  const bool widen = kernel.widen_panel && m1 - m0 >= kWidenRows, small = kp * (j1 - j0) <= kSmallWeightBytes;
  static thread_local Scratch scratch;
  int16_t* wide = nullptr;
  if (widen) {
    wide = scratch.get<int16_t>(static_cast<size_t>(kp * (small ? round_up(j1 - j0, kernel.nr) : kernel.nr)));
    if (small) kernel.widen_panel(b + j0 * kp, kp * round_up(j1 - j0, kernel.nv), wide);
  }
  const auto tile = [&](int64_t m, int64_t j, const int16_t* wide_panel) {
    const int count = static_cast<int>(std::min<int64_t>(kernel.mr, m1 - m)),
              used = static_cast<int>(std::min<int64_t>(kernel.nr, s.n - j));
    const int cols = static_cast<int>(panel_columns(kernel, s.n, j));
    const void* a[kMaxMr];
    for (int r = 0; r < count; ++r) a[r] = rows + (m - m0 + r) * stride;
    if (wide_panel)
      kernel.tile_wide(a, count, 1, kp, wide_panel, cols, acc);
    else
      kernel.tile(a, count, 1, kp, b + j * kp, cols, acc);
    job.store(m, j, count, used, acc, scales + (m - m0), corrections + (m - m0));
  };
  if (small) {
    for (int64_t m = m0; m < m1; m += kernel.mr)
      for (int64_t j = j0; j < j1; j += kernel.nr) tile(m, j, wide ? wide + (j - j0) * kp : nullptr);
    return;
  }
  for (int64_t j = j0; j < j1; j += kernel.nr) {
    if (wide) kernel.widen_panel(b + j * kp, kp * panel_columns(kernel, s.n, j), wide);
    for (int64_t m = m0; m < m1; m += kernel.mr) tile(m, j, wide);
  }
}

struct Rows {
  char* data;
  float* scales;
  int32_t* corrections;
  static size_t bytes(int64_t count, int64_t stride) { return static_cast<size_t>(round_up(count * (stride + 8), 64)); }
  Rows(void* memory, int64_t count, int64_t stride)
      : data(static_cast<char*>(memory)),
        scales(reinterpret_cast<float*>(data + count * stride)),
        corrections(reinterpret_cast<int32_t*>(data + count * (stride + 4))) {}
};

void run(const Kernel& kernel, const Shape& s, const Job& job, const void* packed) {
  if (s.m == 0 || s.n == 0) return;
  const int64_t stride = row_stride(kernel, s.k), block = rows_per_block(kernel, s.k), panels = ceil_div(s.n, kernel.nr);
  const int threads = num_threads();
  static thread_local Scratch scratch;
  // Many rows: each thread takes blocks of rows and goes through all of b.
  if (threads > 1 ? s.m >= 2 * kernel.mr * threads : s.m > block) {
    const int64_t mb = even_block(s.m, block, threads, kernel.mr);
    parallel_for(ceil_div(s.m, mb), [&](int64_t begin, int64_t end) {
      Rows rows(scratch.get(Rows::bytes(mb, stride)), mb, stride);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m0 = i * mb, m1 = std::min(s.m, m0 + mb);
        job.load(m0, m1, rows.data, rows.scales, rows.corrections);
        compute(kernel, s, job, packed, m0, m1, 0, s.n, rows.data, rows.scales, rows.corrections);
      }
    });
    return;
  }
  // Few rows: the rows are converted once, then the threads share the panels of b.
  Rows rows(scratch.get(Rows::bytes(s.m, stride)), s.m, stride);
  if (s.m * s.k > 32 * 1024) {  // below that a second fork-join costs more than it saves
    parallel_for(s.m, [&](int64_t begin, int64_t end) {
      job.load(begin, end, rows.data + begin * stride, rows.scales + begin, rows.corrections + begin);
    });
  } else {
    job.load(0, s.m, rows.data, rows.scales, rows.corrections);
  }
  const auto columns = [&](int64_t begin, int64_t end) {
    compute(kernel, s, job, packed, 0, s.m, begin * kernel.nr, std::min(s.n, end * kernel.nr), rows.data, rows.scales, rows.corrections);
  };
  if (s.m * s.n * s.k < 256 * 1024) {  // about 5 us of work: not worth waking another thread
    columns(0, panels);
  } else {
    parallel_for(panels, columns);
  }
}

struct MatmulJob final : Job {
  const Kernel& kernel;
  const Shape& s;
  const int8_t* a;
  int64_t lda;
  const int32_t* sums;
  int32_t* out;
  int64_t ldo;

  MatmulJob(const Kernel& kernel_, const Shape& s_, const int8_t* a_, int64_t lda_, const void* packed, int32_t* out_, int64_t ldo_)
      : kernel(kernel_), s(s_), a(a_), lda(lda_), sums(column_sums(kernel_, packed, s_.n, s_.k)), out(out_), ldo(ldo_) {}

  void load(int64_t m0, int64_t m1, char* rows, float* scales, int32_t* corrections) const override {
    const int64_t stride = row_stride(kernel, s.k);
    for (int64_t m = m0; m < m1; ++m) {
      kernel.load_row(a + m * lda, s.k, round_up(s.k, kernel.kr), 0, rows + (m - m0) * stride);
      scales[m - m0] = 1.0f;
      corrections[m - m0] = kernel.correction(0);
    }
  }
  void store(int64_t m, int64_t j, int rows, int cols, const int32_t* acc, const float*, const int32_t* correction) const override {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c)  // unsigned: the correction wraps, the difference is exact
        out[(m + r) * ldo + j + c] = static_cast<int32_t>(static_cast<uint32_t>(acc[r * kernel.nr + c]) -
                                                          static_cast<uint32_t>(correction[r]) * static_cast<uint32_t>(sums[j + c]));
  }
};

struct LinearJob final : Job {
  const Kernel& kernel;
  const LinearArgs& p;
  const int32_t* sums;
  float static_inverse;

  LinearJob(const Kernel& kernel_, const LinearArgs& p_)
      : kernel(kernel_), p(p_), sums(column_sums(kernel_, p_.packed, p_.n, p_.k)), static_inverse(p_.dynamic ? 0.0f : 1.0f / p_.x_scale) {}

  void load(int64_t m0, int64_t m1, char* rows, float* scales, int32_t* corrections) const override {
    quantize_all(m0, m1, rows, scales, corrections);
    if (kernel.encode_rows) kernel.encode_rows(rows, row_stride(kernel, p.k), m1 - m0, p.k, p.asymmetric || p.x_zero_point != 0);
  }
  void quantize_all(int64_t m0, int64_t m1, char* rows, float* scales, int32_t* corrections) const {
    const int64_t stride = row_stride(kernel, p.k), kp = round_up(p.k, kernel.kr);
    const bool simple = kernel.quantize_rows && p.dynamic && !p.asymmetric;
    if (simple) std::fill(corrections, corrections + (m1 - m0), kernel.correction(0));
    if (simple && p.x_dtype == DType::f32) {
      kernel.quantize_rows(static_cast<const float*>(p.x) + m0 * p.ldx, p.ldx, m1 - m0, p.k, kp, rows, stride, scales);
      return;
    }
    for (int64_t m = m0; m < m1; ++m, rows += stride) {
      const float* x = row(m);
      if (simple) {
        kernel.quantize_rows(x, p.k, 1, p.k, kp, rows, stride, scales + (m - m0));
        continue;
      }
      int32_t zero_point = 0;
      quantize(x, rows, scales[m - m0], zero_point);
      corrections[m - m0] = kernel.correction(zero_point);
    }
  }
  const float* row(int64_t m) const {
    if (p.x_dtype == DType::f32) return static_cast<const float*>(p.x) + m * p.ldx;
    static thread_local Scratch scratch;
    float* wide = scratch.get<float>(static_cast<size_t>(p.k));
    kernel.widen(static_cast<const uint16_t*>(p.x) + m * p.ldx, p.x_dtype, p.k, wide);
    return wide;
  }
  void quantize(const float* x, void* dst, float& scale, int32_t& zero_point) const {
    float inverse = static_inverse;
    const float amax = kernel.amax(x, p.k);
    if (!(amax <= 3.402823466e38f)) {  // NaN and Inf inputs poison their row, as they would in float
      scale = NAN;
      inverse = 0.0f;
    } else if (!p.dynamic) {
      scale = p.x_scale;
      zero_point = p.x_zero_point;
    } else {  // the same arithmetic as pycompress/ops/affine.py: symmetric_scale, asymmetric_qparams, inverse_scale
      float low = 0.0f, high = 0.0f;
      if (p.asymmetric) kernel.range(x, p.k, &low, &high);
      scale = amax < 0x1p-100f ? 0.0f : p.asymmetric ? high / 255.0f - low / 255.0f : amax / 127.0f;
      inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      if (p.asymmetric) zero_point = static_cast<int32_t>(std::nearbyint(-128.0f - low * inverse));
    }
    kernel.quantize_row(x, p.k, round_up(p.k, kernel.kr), inverse, zero_point, p.quant_min, dst);
  }
  bool fused(int64_t m, int64_t rows, int64_t j0, int64_t j1, const char* a, const int8_t* b, const float* row_scale,
             const int32_t* correction) const override {
    if (!kernel.linear) return false;
    const int64_t kp = round_up(p.k, kernel.kr), stride = row_stride(kernel, p.k);
    const bool half = p.out_dtype != DType::f32, late = p.activation != Activation::none && p.activation != Activation::relu;
    static thread_local Scratch scratch;
    float* strip = half ? scratch.get<float>(static_cast<size_t>(rows * kernel.nr)) : nullptr;
    for (int64_t j = j0; j < j1; j += kernel.nr) {
      const Epilogue e{row_scale, correction, p.scale + j, p.bias ? p.bias + j : nullptr, sums + j, late ? Activation::none : p.activation};
      const int used = static_cast<int>(std::min<int64_t>(kernel.nr, p.n - j));
      float* out = half ? strip : static_cast<float*>(p.out) + m * p.n + j;
      const int64_t ldo = half ? kernel.nr : p.n;
      kernel.linear(a, stride, rows, kp, b + j * kp, used, e, out, ldo);
      if (late) kernel.activate(out, rows, used, ldo, p.activation);
      if (!half) continue;
      for (int64_t r = 0; r < rows; ++r)
        kernel.narrow(strip + r * kernel.nr, used, p.out_dtype, static_cast<uint16_t*>(p.out) + (m + r) * p.n + j);
    }
    return true;
  }
  void store(int64_t m, int64_t j, int rows, int cols, const int32_t* acc, const float* row_scale,
             const int32_t* correction) const override {
    const Epilogue e{row_scale, correction, p.scale + j, p.bias ? p.bias + j : nullptr, sums + j, p.activation};
    if (p.out_dtype == DType::f32) {
      kernel.store_f32(acc, rows, cols, e, static_cast<float*>(p.out) + m * p.n + j, p.n);
      return;
    }
    alignas(64) float wide[kMaxMr * kMaxNr];
    kernel.store_f32(acc, rows, cols, e, wide, kMaxNr);
    for (int r = 0; r < rows; ++r) kernel.narrow(wide + r * kMaxNr, cols, p.out_dtype, static_cast<uint16_t*>(p.out) + (m + r) * p.n + j);
  }
};

const Kernel& for_depth(const Kernel& kernel, int64_t k) { return kernel.shallow && k < kShallow ? *kernel.shallow : kernel; }

}  // namespace

size_t packed_bytes(const Kernel& any, int64_t n, int64_t k) {
  const Kernel& kernel = for_depth(any, k);
  return static_cast<size_t>(panel_bytes(kernel, n, k) + round_up(n, kernel.nv) * 4);
}

void pack(const Kernel& any, const int8_t* b, int64_t ldb, int64_t n, int64_t k, void* packed) {
  const Kernel& kernel = for_depth(any, k);
  const int64_t kp = round_up(k, kernel.kr), kr = kernel.kr;
  std::memset(packed, 0, packed_bytes(kernel, n, k));
  int32_t* sums = const_cast<int32_t*>(column_sums(kernel, packed, n, k));
  parallel_for(ceil_div(n, kernel.nr), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kernel.nr; j < std::min(n, end * kernel.nr); ++j) {
      const int64_t j0 = j / kernel.nr * kernel.nr, cols = panel_columns(kernel, n, j0);
      int8_t* panel = static_cast<int8_t*>(packed) + j0 * kp + (j - j0) * kr;
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        panel[i / kr * cols * kr + i % kr] = static_cast<int8_t>(b[j * ldb + i] ^ kernel.weight_flip);
        sum += b[j * ldb + i];
      }
      sums[j] = sum;
    }
  });
}

void unpack(const Kernel& any, const void* packed, int64_t n, int64_t k, int8_t* b) {
  const Kernel& kernel = for_depth(any, k);
  const int64_t kp = round_up(k, kernel.kr), kr = kernel.kr;
  parallel_for(ceil_div(n, kernel.nr), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kernel.nr; j < std::min(n, end * kernel.nr); ++j) {
      const int64_t j0 = j / kernel.nr * kernel.nr, cols = panel_columns(kernel, n, j0);
      const int8_t* panel = static_cast<const int8_t*>(packed) + j0 * kp + (j - j0) * kr;
      for (int64_t i = 0; i < k; ++i) b[j * k + i] = static_cast<int8_t>(panel[i / kr * cols * kr + i % kr] ^ kernel.weight_flip);
    }
  });
}

void matmul(const Kernel& any, int64_t m, int64_t n, int64_t k, const int8_t* a, int64_t lda, const void* packed, int32_t* out,
            int64_t ldo) {
  const Kernel& kernel = for_depth(any, k);
  const Shape s{m, n, k};
  run(kernel, s, MatmulJob(kernel, s, a, lda, packed, out, ldo), packed);
}

void linear(const Kernel& any, const LinearArgs& args) {
  const Kernel& kernel = for_depth(any, args.k);
  const Shape s{args.m, args.n, args.k};
  run(kernel, s, LinearJob(kernel, args), args.packed);
}

}  // namespace pycompress::int8_matmul
