// Temporary: holds the place of the sampling kernel in the table until it lands.
#pragma once

#include <stdexcept>

#include "ops/ops.h"

namespace hybrid::cpu::HYBRID_ISA {

inline void sample(const Sample&) { throw std::logic_error("sample: the CPU kernel has not landed yet"); }

}  // namespace hybrid::cpu::HYBRID_ISA
