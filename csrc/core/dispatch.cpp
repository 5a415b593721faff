#include "core/dispatch.h"

namespace pycompress {
namespace {

bool g_forced = false;
Isa g_level = Isa::scalar;

}  // namespace

void force_isa(const std::string& name) {
  if (name.empty()) {
    g_forced = false;
    return;
  }
  std::string known;
  for (int i = 0; i < static_cast<int>(Isa::kCount); ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    if (name == isa_name(isa)) {
      g_level = isa;
      g_forced = true;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("PYCOMPRESS_ISA must be one of " + known + " on this machine, got '" + name + "'");
}

std::string forced_isa() { return g_forced ? isa_name(g_level) : ""; }

bool isa_allowed(Isa isa) { return isa_available(isa) && (!g_forced || isa_implies(g_level, isa)); }

}  // namespace pycompress
