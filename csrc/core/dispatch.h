// Chooses a kernel out of an op's list of records.
//
// A record is a struct with at least `const char* name; Isa isa;`, and each op has one list, best first. A call
// names its kernel, or passes "" for the best one that this machine runs and the forced ISA allows.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu_features.h"

namespace pycompress {

// PYCOMPRESS_ISA: kernels above this level are not chosen. Throws std::invalid_argument for an unknown or
// unavailable name; "" lifts the limit.
void force_isa(const std::string& name);
std::string forced_isa();  // "" if none

bool isa_allowed(Isa isa);  // available here, and not above the forced level

template <class Kernel>
using KernelList = std::vector<const Kernel*>;

template <class Kernel>
std::vector<std::string> usable_names(const KernelList<Kernel>& list) {
  std::vector<std::string> names;
  for (const Kernel* k : list)
    if (isa_allowed(k->isa)) names.emplace_back(k->name);
  return names;
}

template <class Kernel>
const Kernel& choose(const char* op, const KernelList<Kernel>& list, const std::string& name) {
  for (const Kernel* k : list)
    if (name.empty() ? isa_allowed(k->isa) : name == k->name && isa_available(k->isa)) return *k;
  std::string known;
  for (const std::string& n : usable_names(list)) known += (known.empty() ? "" : ", ") + n;
  throw std::invalid_argument(std::string(op) + ": no kernel '" + name + "' on this machine, expected one of " + known);
}

}  // namespace pycompress
