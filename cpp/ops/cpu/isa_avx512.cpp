#if defined(__x86_64__)
#define HYBRID_ISA avx512
#include "ops/cpu/isa_table.h"

namespace hybrid::cpu {

constinit const Kernels avx512_kernels = avx512::table("avx512");

}  // namespace hybrid::cpu
#endif
