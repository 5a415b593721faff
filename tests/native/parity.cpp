// pycompress_parity [--one-thread] [suite...]: exit code 0 if all kernels agree.
#include "parity.h"

#include <atomic>
#include <cmath>
#include <limits>

#include "core/parallel.h"

namespace parity {
namespace {

std::vector<Suite*>& suites() {
  static std::vector<Suite*> list;
  return list;
}
std::atomic<int64_t> checks{0}, failures{0};

}  // namespace

Suite::Suite(const char* name_, void (*run_)()) : name(name_), run(run_) { suites().push_back(this); }

void expect(bool ok, const std::string& what) {
  ++checks;
  if (!ok && ++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

double difference(const float* a, const float* b, int64_t count) {
  double worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (a[i] == b[i]) continue;
    const double d = std::fabs(static_cast<double>(a[i]) - b[i]) / std::fmax(1.0, std::fabs(static_cast<double>(b[i])));
    worst = std::isfinite(d) ? std::fmax(worst, d) : std::numeric_limits<double>::infinity();
  }
  return worst;
}

bool same_bits(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!(std::isnan(a[i]) && std::isnan(b[i])) && std::memcmp(a + i, b + i, 4) != 0) return false;
  return true;
}

}  // namespace parity

int main(int argc, char** argv) {
  const int first = argc > 1 && std::strcmp(argv[1], "--one-thread") == 0 ? 2 : 1;
  for (int threads : {1, 3}) {
    if (threads > 1 && first == 2) break;
    pycompress::set_pool_threads(threads);
    for (const parity::Suite* suite : parity::suites()) {
      bool wanted = argc == first;
      for (int i = first; i < argc; ++i) wanted |= std::strcmp(argv[i], suite->name) == 0;
      if (!wanted) continue;
      const int64_t before = parity::checks;
      suite->run();
      std::printf("%s, %d threads: %lld checks\n", suite->name, threads, static_cast<long long>(parity::checks - before));
    }
  }
  if (parity::checks == 0) {
    std::fprintf(stderr, "no such suite\n");
    return 2;
  }
  std::printf("%lld failures\n", static_cast<long long>(parity::failures));
  return parity::failures != 0;
}
