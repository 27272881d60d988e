#if defined(__x86_64__)
#define HYBRID_ISA avx512_bf16
#include "ops/cpu/isa_table.h"

namespace hybrid::cpu {

constinit const Kernels avx512_bf16_kernels = avx512_bf16::table("avx512_bf16");

}  // namespace hybrid::cpu
#endif
