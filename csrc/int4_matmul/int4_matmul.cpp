#include "int4_matmul/int4_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"

namespace pycompress::int4_matmul {

extern const Kernel kScalar;
#if PC_X86
extern const Kernel kAvx2;
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
      &kAvx2,
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

// Operands of a block of rows: half of a 512 KB L2. Sums a of the block: half of a 32 KB L1, so at most 60 rows of 64 columns.
constexpr int64_t kRowBlockBytes = 256 * 1024;
constexpr int64_t kMaxBlock = 60;

struct Layout {
  int64_t n, k, kp, group, groups, nv;
  Layout(const Kernel& kernel, int64_t n_, int64_t k_, int64_t group_)
      : n(n_), k(k_), kp(round_up(k_, kChunk)), group(group_), groups(ceil_div(k_, group_)), nv(kernel.nv) {}

  int64_t depth(int64_t g) const { return std::min(group, kp - g * group); }
  int64_t cols(int64_t j) const { return round_up(std::min<int64_t>(kNr, n - j), nv); }
  int64_t column_bytes() const { return kp / 2 + groups * 4; }
  int64_t weight_offset(int64_t j, int64_t g) const { return j * column_bytes() + cols(j) * g * (group / 2 + 4); }
  int64_t scale_offset(int64_t j, int64_t g) const { return weight_offset(j, g) + cols(j) * depth(g) / 2; }
  int64_t zero_offset(int64_t j, int64_t g) const { return round_up(n, nv) * column_bytes() + j * groups + cols(j) * g; }
};

// Rows as operands: [stride] bytes each, then the group sums, then the row scales.
struct Rows {
  int64_t stride, groups;
  char* data;
  char* sums;
  float* scales;

  Rows(const Layout& l, bool int8) : stride(round_up(l.kp * (int8 ? 1 : 4), 64)), groups(l.groups), data(nullptr) {
    if (stride % 1024 == 0) stride += 64;  // keeps neighbouring rows out of one L1 set
  }
  size_t bytes(int64_t count) const { return static_cast<size_t>(count * (stride + groups * 4 + 4)); }
  void place(void* memory, int64_t count) {
    data = static_cast<char*>(memory);
    sums = data + count * stride;
    scales = reinterpret_cast<float*>(sums + count * groups * 4);
  }
};

void load_row(const Kernel& kernel, const LinearArgs& p, const Layout& l, int64_t m, const Rows& rows, int64_t r) {
  const float* x = static_cast<const float*>(p.x) + m * p.ldx;
  if (p.x_dtype != DType::f32) {
    static thread_local Scratch scratch;
    float* wide = scratch.get<float>(static_cast<size_t>(p.k));
    kernel.helper->widen(static_cast<const uint16_t*>(p.x) + m * p.ldx, p.x_dtype, p.k, wide);
    x = wide;
  }
  const float amax = kernel.helper->amax(x, p.k);
  const bool finite = amax <= 3.402823466e38f;  // NaN and Inf inputs poison their row
  float& scale = rows.scales[r];
  scale = finite ? 1.0f : NAN;
  if (p.int8_activations) {
    float inverse = 0.0f;
    if (finite) {  // the same arithmetic as pycompress/ops/affine.py: symmetric_scale, inverse_scale
      scale = amax < 0x1p-100f ? 0.0f : amax / 127.0f;
      inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    }
    int8_t* q = reinterpret_cast<int8_t*>(rows.data + r * rows.stride);
    kernel.quantize_row(x, p.k, l.kp, inverse, q);
    int32_t* sums = reinterpret_cast<int32_t*>(rows.sums + r * l.groups * 4);
    for (int64_t g = 0; g < l.groups; ++g) {
      int32_t sum = 0;
      for (int64_t i = g * l.group; i < g * l.group + l.depth(g); ++i) sum += q[i];
      sums[g] = sum;
    }
    return;
  }
  static constexpr float kDown[8] = {0x1p0f, 0x1p-8f, 0x1p-16f, 0x1p-24f, 0x1p-4f, 0x1p-12f, 0x1p-20f, 0x1p0f};  // 2^-kShift
  float* dst = reinterpret_cast<float*>(rows.data + r * rows.stride);
  float* sums = reinterpret_cast<float*>(rows.sums + r * l.groups * 4);
  int64_t i = 0;
  for (; i + 8 <= p.k; i += 8)
    for (int64_t b = 0; b < 8; ++b) dst[i + b] = x[i + b] * kDown[b];
  for (; i < l.kp; ++i) dst[i] = i < p.k ? x[i] * kDown[i % 8] : 0.0f;
  for (int64_t g = 0; g < l.groups; ++g) {  // in double: the sum is then as good as exact, and the order does not show
    double sum[4] = {0, 0, 0, 0};
    const int64_t end = std::min(p.k, (g + 1) * l.group);
    for (i = g * l.group; i + 4 <= end; i += 4)
      for (int64_t b = 0; b < 4; ++b) sum[b] += x[i + b];
    for (; i < end; ++i) sum[0] += x[i];
    sums[g] = static_cast<float>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// Panels [begin, end) of `count` rows, which are already operands; m0 is the first one's place in the output.
void compute(const Kernel& kernel, const LinearArgs& p, const Layout& l, const Rows& rows, int64_t m0, int64_t first, int64_t count,
             int64_t begin, int64_t end) {
  alignas(64) float acc[kMaxBlock * kNr];
  const char* packed = static_cast<const char*>(p.packed);
  for (int64_t j = begin * kNr; j < std::min(l.n, end * kNr); j += kNr) {
    const int cols = static_cast<int>(l.cols(j)), used = static_cast<int>(std::min<int64_t>(kNr, l.n - j));
    const Epilogue e{rows.scales + first, p.bias ? p.bias + j : nullptr, p.activation};
    const int64_t m = m0 + first;
    const bool fused = kernel.fused && p.int8_activations && p.out_dtype == DType::f32 && l.groups > 0 &&
                       (p.activation == Activation::none || p.activation == Activation::relu);
    if (!fused) std::memset(acc, 0, static_cast<size_t>(count) * kNr * sizeof(float));
    for (int64_t g = 0; g < l.groups; ++g) {
      const Group group{rows.data + first * rows.stride + g * l.group * (p.int8_activations ? 1 : 4),
                        rows.stride,
                        rows.sums + (first * l.groups + g) * 4,
                        l.groups * 4,
                        count,
                        l.depth(g),
                        reinterpret_cast<const uint32_t*>(packed + l.weight_offset(j, g)),
                        cols,
                        reinterpret_cast<const float*>(packed + l.scale_offset(j, g)),
                        p.asymmetric ? reinterpret_cast<const uint8_t*>(packed + l.zero_offset(j, g)) : nullptr,
                        acc,
                        fused && g == 0,
                        fused && g + 1 == l.groups ? &e : nullptr,
                        fused ? static_cast<float*>(p.out) + m * l.n + j : nullptr,
                        l.n,
                        used};
      (p.int8_activations ? kernel.group_int8 : kernel.group_float)(group);
    }
    if (fused) continue;
    if (p.out_dtype == DType::f32) {
      kernel.store(acc, count, used, e, static_cast<float*>(p.out) + m * l.n + j, l.n);
    } else {
      kernel.store(acc, count, used, e, acc, kNr);
      for (int64_t r = 0; r < count; ++r)
        kernel.helper->narrow(acc + r * kNr, used, p.out_dtype, static_cast<uint16_t*>(p.out) + (m + r) * l.n + j);
    }
  }
}

}  // namespace

size_t packed_bytes(const Kernel& kernel, int64_t n, int64_t k, int64_t group, bool asymmetric) {
  const Layout l(kernel, n, k, group);
  return static_cast<size_t>(round_up(n, kernel.nv) * (l.column_bytes() + (asymmetric ? l.groups : 0)));
}

void pack(const Kernel& kernel, const uint8_t* weight, const float* scale, const uint8_t* zero, int64_t n, int64_t k, int64_t group,
          void* packed) {
  const Layout l(kernel, n, k, group);
  std::memset(packed, 0, packed_bytes(kernel, n, k, group, zero != nullptr));
  char* base = static_cast<char*>(packed);
  const int64_t ldw = ceil_div(k, 2);
  parallel_for(ceil_div(n, kNr), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kNr; c < std::min(n, end * kNr); ++c) {
      const int64_t j = c / kNr * kNr, cols = l.cols(j);
      for (int64_t g = 0; g < l.groups; ++g) {
        reinterpret_cast<float*>(base + l.scale_offset(j, g))[c - j] = scale[c * l.groups + g];
        if (zero) base[l.zero_offset(j, g) + c - j] = static_cast<char>(zero[c * l.groups + g]);
        uint32_t* w = reinterpret_cast<uint32_t*>(base + l.weight_offset(j, g)) + (c - j);
        const int64_t k0 = g * group;
        for (int64_t i = k0; i < std::min(k, k0 + group); ++i) {
          const uint32_t u = weight[c * ldw + i / 2] >> (i % 2 * 4) & 15;
          w[(i - k0) / 8 * cols] |= u << kPosition[i % 8];
        }
      }
    }
  });
}

void unpack(const Kernel& kernel, const void* packed, int64_t n, int64_t k, int64_t group, uint8_t* weight, float* scale, uint8_t* zero) {
  const Layout l(kernel, n, k, group);
  const char* base = static_cast<const char*>(packed);
  const int64_t ldw = ceil_div(k, 2);
  parallel_for(ceil_div(n, kNr), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kNr; c < std::min(n, end * kNr); ++c) {
      const int64_t j = c / kNr * kNr, cols = l.cols(j);
      for (int64_t g = 0; g < l.groups; ++g) {
        scale[c * l.groups + g] = reinterpret_cast<const float*>(base + l.scale_offset(j, g))[c - j];
        if (zero) zero[c * l.groups + g] = static_cast<uint8_t>(base[l.zero_offset(j, g) + c - j]);
        const uint32_t* w = reinterpret_cast<const uint32_t*>(base + l.weight_offset(j, g)) + (c - j);
        const int64_t k0 = g * group;
        for (int64_t i = k0; i < std::min(k, k0 + group); ++i) {
          const uint8_t u = w[(i - k0) / 8 * cols] >> kPosition[i % 8] & 15;
          uint8_t& byte = weight[c * ldw + i / 2];
          byte = static_cast<uint8_t>(i % 2 ? byte | u << 4 : u);
        }
      }
    }
  });
}

void linear(const Kernel& kernel, const LinearArgs& p) {
  if (p.m == 0 || p.n == 0) return;
  const Layout l(kernel, p.n, p.k, p.group);
  Rows rows(l, p.int8_activations);
  const int64_t block = std::min<int64_t>(kMaxBlock, std::max<int64_t>(6, kRowBlockBytes / rows.stride / 6 * 6)),
                panels = ceil_div(p.n, kNr);
  const int threads = num_threads();
  static thread_local Scratch scratch;
  // Many rows: each thread takes blocks of rows and goes through the whole weight.
  if (p.m > block && p.m >= 12 * threads) {
    const int64_t mb = even_block(p.m, block, threads, 6);
    parallel_for(ceil_div(p.m, mb), [&](int64_t begin, int64_t end) {
      Rows own(rows);
      own.place(scratch.get(own.bytes(mb)), mb);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m0 = i * mb, count = std::min(p.m - m0, mb);
        for (int64_t r = 0; r < count; ++r) load_row(kernel, p, l, m0 + r, own, r);
        compute(kernel, p, l, own, m0, 0, count, 0, panels);
      }
    });
    return;
  }
  // Few rows: they are converted once, then the threads share the panels.
  rows.place(scratch.get(rows.bytes(p.m)), p.m);
  for (int64_t r = 0; r < p.m; ++r) load_row(kernel, p, l, r, rows, r);
  const auto columns = [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < p.m; first += block) compute(kernel, p, l, rows, 0, first, std::min(block, p.m - first), begin, end);
  };
  if (p.m * p.n * p.k < 256 * 1024) {  // about 5 us of work: not worth waking another thread
    columns(0, panels);
  } else {
    parallel_for(panels, columns);
  }
}

}  // namespace pycompress::int4_matmul
