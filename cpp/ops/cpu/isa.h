// The table of kernels of one instruction set, and the choice among the tables.
//
// A kernel file (cpu/kernels/x.h) is a template over the vector types of cpu/vec.h. Each cpu/isa_*.cpp includes them
// all and fills one table; isa.cpp looks at the CPU once. HYBRID_CPU_ISA=baseline|avx2|avx512|avx512_bf16|amx lowers
// the choice (for tests and for bug hunts); asking for more than the CPU has is an error, never SIGILL.
#pragma once

#include <vector>

#include "ops/ops.h"

namespace hybrid::cpu {

struct Kernels {
  const char* name;
  void (*linear)(const Linear&);
  void (*rms_norm)(const RmsNorm&);
  void (*rotate_and_store)(const RotateAndStore&);
  void (*silu_mul)(const SiluMul&);
  void (*paged_attention)(const PagedAttention&);
  void (*sample)(const Sample&);
};

extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels;

// The tables this CPU and its operating system can run, weakest first; baseline is always there.
const std::vector<const Kernels*>& supported_kernels();

// The table in use. Throws std::invalid_argument if HYBRID_CPU_ISA names an unknown or unsupported set.
const Kernels& kernels();

}  // namespace hybrid::cpu
