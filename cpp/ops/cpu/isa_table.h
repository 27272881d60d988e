// All kernels of one instruction set; included by exactly one cpu/isa_*.cpp each, after `#define HYBRID_ISA <name>`.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/cpu/kernels/linear.h"
#include "ops/cpu/kernels/paged_attention.h"
#include "ops/cpu/kernels/rms_norm.h"
#include "ops/cpu/kernels/rotate_and_store.h"
#include "ops/cpu/kernels/sample.h"
#include "ops/cpu/kernels/silu_mul.h"

namespace hybrid::cpu::HYBRID_ISA {

constexpr Kernels table(const char* name) {
  return {name, linear, rms_norm, rotate_and_store, silu_mul, paged_attention, sample};
}

}  // namespace hybrid::cpu::HYBRID_ISA
