#if defined(__x86_64__)
#define HYBRID_ISA amx
#include "ops/cpu/isa_table.h"

namespace hybrid::cpu {

constinit const Kernels amx_kernels = amx::table("amx");

}  // namespace hybrid::cpu
#endif
