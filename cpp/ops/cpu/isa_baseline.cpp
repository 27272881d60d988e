#define HYBRID_ISA baseline
#include "ops/cpu/isa_table.h"

namespace hybrid::cpu {

constinit const Kernels baseline_kernels = baseline::table("baseline");

}  // namespace hybrid::cpu
