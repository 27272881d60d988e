// What every op asks of its arguments: shapes, dtypes, layout, one device, and, where the data can be read cheaply (on
// a CPU), indices inside their tables. Throws std::invalid_argument that names the op, the tensor and the numbers.
#pragma once

#include "ops/ops.h"

namespace hybrid {

void check(const Embedding&);
void check(const PackWeight&);
void check(const Linear&);
void check(const LinearSiluMul&);
void check(const RmsNorm&);
void check(const NormLinear&);
void check(const RotateAndStore&);
void check(const SiluMul&);
void check(const PlanDecode&);
void check(const PagedAttention&);
void check(const CopyBlocks&);
void check(const SwapBlocks&);
void check(const Sample&);

}  // namespace hybrid
