// Fetching of weights by software, for panels of 16 columns: they come in one long stream, which the hardware alone does not fetch early
// enough from L3 and memory. One tile of rows fetches what it will need 8 KB later, several tiles share in fetching the next panel.
#pragma once
#include <cstdint>

#include "core/types.h"

namespace pycompress::int8_matmul {
namespace {

struct Fetch {
  static constexpr int64_t kAhead = 8192;

  const int8_t* from;
  int64_t step;  // bytes per group

  // For a panel in groups of `group` bytes that serves `tiles` tiles one after the other.
  Fetch(const int8_t* panel, int64_t groups, int64_t group, int64_t tiles)
      : from(panel + (tiles == 1 ? kAhead : groups * group)), step(group / tiles) {}
};

}  // namespace
}  // namespace pycompress::int8_matmul
