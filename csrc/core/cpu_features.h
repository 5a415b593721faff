// What this CPU and this operating system can run.
#pragma once

namespace pycompress {

// Instruction sets that kernels are written for. `scalar` is plain C++ and always available. `avx512_vbmi` stands for VNNI with VBMI,
// the byte permutation over a whole vector (Ice Lake, Zen 4 and later).
enum class Isa : int { scalar = 0, avx2, avx_vnni, avx512, avx512_vnni, avx512_vbmi, neon, neon_dotprod, neon_i8mm, kCount };

const char* isa_name(Isa isa);

// True if the CPU has the instructions and the OS saves the registers they use.
bool isa_available(Isa isa);

// True if a CPU that runs `level` also runs `isa` (avx512_vnni runs avx2 kernels, everything runs scalar ones).
bool isa_implies(Isa level, Isa isa);

// "AuthenticAMD", "GenuineIntel", "" where unknown.
const char* cpu_vendor();

// Bytes of a core's first data cache; 32 KB where the CPU does not say.
int l1_data_bytes();

}  // namespace pycompress
