// wgmma: operands by their descriptors in shared memory, products that end when they are waited for. (PTX ISA, "Asynchronous Warpgroup
// Level Matrix Instructions": "Matrix Descriptor Format", "Strides", "Register Fragments and Shared Memory Matrix Layouts", "wgmma.fence".)
//
// While a product is on its way its sums hold poison. Its operands are read when it starts, and must be the same when it ends.
#pragma once
#include "emulation.h"

namespace emulation {

// All four warps of a warpgroup, as `.sync.aligned` instructions of it want.
inline void warpgroup_meets(const char* what, int line) {
  Fiber& f = *machine.current;
  const unsigned group = f.linear / 128;
  if ((group + 1) * 128 > f.block->fibers.size()) fail(std::string(what) + ": needs four whole warps");
  Meeting& m = f.block->barriers[-1 - static_cast<int>(group)];
  arrive(m, what, line, 128);
  if (m.arrived == m.expected)
    open(m);
  else
    wait(m);
}

inline void set_registers(int count, int line) {
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg: must be a multiple of 8 from 24 to 256");
  warpgroup_meets("setmaxnreg", line);
}

inline void wgmma_fence(int line) {
  (void)gather(0xffffffffu, 0, "wgmma.fence", line);
  machine.current->sums_fenced = true;
}

inline void wgmma_commit(int line) {
  (void)gather(0xffffffffu, 0, "wgmma.commit_group", line);
  Fiber& f = *machine.current;
  f.products.push_back(std::move(f.open_products));
  f.open_products.clear();
}

inline void wgmma_wait(size_t pending, int line) {
  (void)gather(0xffffffffu, 0, "wgmma.wait_group", line);
  Fiber& f = *machine.current;
  for (; f.products.size() > pending; f.products.pop_front())
    for (const Action& product : f.products.front()) product();
  (void)gather(0xffffffffu, 0, "wgmma.wait_group", line);  // it returns for the whole warp
}

// An operand of 8 n rows of `bytes` (32 or 64) bytes along k, K-major. Fields of the descriptor: 0..13 start, 16..29 distance along k of
// columns of core matrices (without swizzle only), 32..45 distance of groups of eight rows, each divided by 16; 49..51 bits 7..9 of the
// place where the pattern starts; 62..63 swizzle: 0 none, 1 128 bytes, 2 64, 3 32.
struct Operand {
  uint32_t start, along_k, along_rows, base, width;

  explicit Operand(uint64_t d)
      : start(static_cast<uint32_t>(d & 0x3fff) << 4),
        along_k(static_cast<uint32_t>(d >> 16 & 0x3fff) << 4),
        along_rows(static_cast<uint32_t>(d >> 32 & 0x3fff) << 4),
        base(static_cast<uint32_t>(d >> 49 & 7)),
        width(d >> 62 == 0 ? 16 : 256 >> (d >> 62)) {}

  const unsigned char* chunk(int row, int index) const {  // 16 bytes
    const Block& b = *machine.current->block;
    uint32_t address = start + static_cast<uint32_t>(row / 8) * along_rows + static_cast<uint32_t>(row % 8) * width;
    address = swizzled(address + static_cast<uint32_t>(index) * (width == 16 ? along_k : 16), width, base);
    if (address < kSharedBase || address - kSharedBase + 16 > b.dynamic_bytes) fail("wgmma: a descriptor leads out of shared memory");
    return b.dynamic + (address - kSharedBase);
  }
};

struct Rows {
  int count = 0, bytes = 0;
  std::vector<unsigned char> data;
  Rows(const Operand& from, const std::vector<int>& rows, int bytes) : count(static_cast<int>(rows.size())), bytes(bytes) {
    data.resize(rows.size() * static_cast<size_t>(bytes));
    size_t at = 0;
    for (const int row : rows)
      for (int i = 0; i < bytes / 16; ++i, at += 16) std::memcpy(data.data() + at, from.chunk(row, i), 16);
  }
  template <class Element>
  const Element* row(int i) const {
    return reinterpret_cast<const Element*>(data.data() + i * bytes);
  }
};

// Takes the sums away from the thread until `run` has come back to be called by a wait.
template <class Sum, size_t kSums, class Run>
void start_product(Sum (&d)[kSums], const Run& run) {
  Fiber& f = *machine.current;
  InFlight& sums = f.in_flight[&d];
  if (sums.operations++ == 0) {
    if (!f.sums_fenced) fail("wgmma: no wgmma.fence since its sums last were the thread's");
    sums.values.assign(reinterpret_cast<unsigned char*>(d), reinterpret_cast<unsigned char*>(d + kSums));
    std::memset(&d, kPoison, sizeof d);
  }
  f.open_products.push_back([&f, &d, run] {
    InFlight& sums = f.in_flight.at(&d);
    run(reinterpret_cast<Sum*>(sums.values.data()));
    if (--sums.operations) return;
    std::memcpy(&d, sums.values.data(), sizeof d);
    f.in_flight.erase(&d);
    f.sums_fenced = false;
  });
}

// Rows of A (two) and columns of B that this thread's sums need, for kSums sums.
inline std::vector<int> own_rows() {
  const int row = static_cast<int>(machine.current->linear % 128 / 32 * 16 + machine.current->lane / 4);
  return {row, row + 8};
}
inline std::vector<int> own_columns(size_t sums) {
  std::vector<int> columns;
  for (int j = 0; j < static_cast<int>(sums / 4); ++j)
    for (int c = 0; c < 2; ++c) columns.push_back(8 * j + static_cast<int>(machine.current->lane % 4) * 2 + c);
  return columns;
}

inline void same_descriptors(uint64_t a, uint64_t b, const char* what, int line) {
  warpgroup_meets(what, line);
  const auto all = gather(0xffffffffu, std::array<uint64_t, 2>{a, b}, what, line);
  for (const auto& other : all)
    if (other != all[0]) fail(std::string(what) + ": descriptors must be the same in all lanes");
}

template <class Element, class Sum, size_t kSums>
void wgmma(Sum (&d)[kSums], uint64_t a, uint64_t b, int line) {
  same_descriptors(a, b, "wgmma", line);
  const std::vector<int> rows = own_rows(), columns = own_columns(kSums);
  const Operand from_a(a), from_b(b);
  const Rows in_a(from_a, rows, 32), in_b(from_b, columns, 32);
  start_product(d, [=](Sum* sums) {
    if (Rows(from_a, rows, 32).data != in_a.data || Rows(from_b, columns, 32).data != in_b.data)
      fail("wgmma: an operand in shared memory changed while it was in use");
    for (size_t i = 0; i < kSums; ++i) {
      const Element* const x = in_a.row<Element>(static_cast<int>(i / 2 % 2));
      const Element* const y = in_b.row<Element>(static_cast<int>(i / 4 * 2 + i % 2));
      Sum sum = sums[i];
      for (size_t k = 0; k < 32 / sizeof(Element); ++k) sum += static_cast<Sum>(x[k]) * static_cast<Sum>(y[k]);
      sums[i] = sum;
    }
  });
}

// With 2:4 kept values in A, 32 bytes per row, against 64 bytes of B. Places: four bits per group of four along k; for 16-bit elements
// lanes 0 and 1 of four hold groups 0..3 and 4..7, row g in the lower half, g + 8 in the upper; for 8-bit ones lane t holds groups 8 (t /
// 2) .. of row g + 8 (t % 2). (PTX ISA, "Sparse matrix storage" of wgmma.mma_async.sp.)
template <class Element, class Sum, size_t kSums>
void wgmma_sparse(Sum (&d)[kSums], uint64_t a, uint64_t b, uint32_t e, int line) {
  same_descriptors(a, b, "wgmma.sp", line);
  const auto words = gather(0xffffffffu, e, "wgmma.sp", line);
  const size_t four = machine.current->lane / 4 * 4;
  constexpr int kStored = 32 / static_cast<int>(sizeof(Element));
  std::vector<int> places(2 * kStored);  // along k, of this thread's two rows
  for (int i = 0; i < 2 * kStored; ++i) {
    const int row = i / kStored, group = i % kStored / 2;
    const size_t lane = sizeof(Element) == 2 ? static_cast<size_t>(group / 4) : static_cast<size_t>(group / 8 * 2 + row);
    const uint32_t both = words[four + lane] >> (sizeof(Element) == 2 ? row * 16 + group % 4 * 4 : group % 8 * 4) & 15u;
    if ((both & 3u) >= both >> 2) fail("wgmma.sp: the places of kept values must rise");
    places[static_cast<size_t>(i)] = 4 * group + static_cast<int>(both >> (i % 2 * 2) & 3u);
  }
  const std::vector<int> rows = own_rows(), columns = own_columns(kSums);
  const Operand from_a(a), from_b(b);
  const Rows in_a(from_a, rows, 32), in_b(from_b, columns, 64);
  start_product(d, [=](Sum* sums) {
    if (Rows(from_a, rows, 32).data != in_a.data || Rows(from_b, columns, 64).data != in_b.data)
      fail("wgmma.sp: an operand in shared memory changed while it was in use");
    for (size_t i = 0; i < kSums; ++i) {
      const int row = static_cast<int>(i / 2 % 2);
      const Element* const x = in_a.row<Element>(row);
      const Element* const y = in_b.row<Element>(static_cast<int>(i / 4 * 2 + i % 2));
      Sum sum = sums[i];
      for (int k = 0; k < kStored; ++k) sum += static_cast<Sum>(x[k]) * static_cast<Sum>(y[places[static_cast<size_t>(row * kStored + k)]]);
      sums[i] = sum;
    }
  });
}

}  // namespace emulation
