// Stands in for the CUDA kernels in a build without them.
#include "common/check.h"
#include "ops/ops.h"

namespace hybrid::cuda {

namespace {

[[noreturn]] void missing(const char* op) {
  throw std::invalid_argument(
      concat(op, ": the tensors are on a CUDA device, but hybrid-serve was built without CUDA"));
}

}  // namespace

bool is_built() { return false; }
void embedding(const Embedding&) { missing("embedding"); }
void pack_weight(const PackWeight&) { missing("pack_weight"); }
void linear(const Linear&) { missing("linear"); }
void linear_silu_mul(const LinearSiluMul&) { missing("linear_silu_mul"); }
void rms_norm(const RmsNorm&) { missing("rms_norm"); }
void norm_linear(const NormLinear&) { missing("norm_linear"); }
void rotate_and_store(const RotateAndStore&) { missing("rotate_and_store"); }
void silu_mul(const SiluMul&) { missing("silu_mul"); }
void plan_decode(const PlanDecode&) { missing("plan_decode"); }
void paged_attention(const PagedAttention&) { missing("paged_attention"); }
void copy_blocks(const CopyBlocks&) { missing("copy_blocks"); }
void swap_blocks(const SwapBlocks&) { missing("swap_blocks"); }
void sample(const Sample&) { missing("sample"); }

}  // namespace hybrid::cuda
