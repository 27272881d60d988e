#if defined(__x86_64__)
#define HYBRID_ISA avx2
#include "ops/cpu/isa_table.h"

namespace hybrid::cpu {

constinit const Kernels avx2_kernels = avx2::table("avx2");

}  // namespace hybrid::cpu
#endif
