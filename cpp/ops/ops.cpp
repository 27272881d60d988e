// The one place that asks which device a tensor is on.
#include "ops/ops.h"

#include <atomic>

#include "common/check.h"
#include "ops/check.h"
#include "ops/dispatch.h"

namespace hybrid {

void not_a_float_type(DType dtype) { throw InternalError(concat("kernel called with ", name_of(dtype))); }

// Of cuda/decode_plan.cuh, for every device: a fixed part and 32 units of 4 numbers a sequence.
int64_t decode_plan_size(int64_t max_decodes) { return 9216 + 128 * max_decodes; }

namespace {

std::atomic<bool> only_batch_invariant{false};

// `sized_by`: the tensor whose emptiness means that there is nothing to do.
template <class Args>
void run(const Args& args, const TensorView& sized_by, void (*on_cpu)(const Args&), void (*on_cuda)(const Args&)) {
  check(args);
  if (sized_by.numel() == 0) return;
  (sized_by.device == Device::cpu ? on_cpu : on_cuda)(args);
}

}  // namespace

void embedding(const Embedding& args) { run(args, args.out, cpu::embedding, cuda::embedding); }
void pack_weight(const PackWeight& args) { run(args, args.weight, cpu::pack_weight, cuda::pack_weight); }
void linear(const Linear& args) { run(args, args.out, cpu::linear, cuda::linear); }
void linear_silu_mul(const LinearSiluMul& args) { run(args, args.out, cpu::linear_silu_mul, cuda::linear_silu_mul); }
void rms_norm(const RmsNorm& args) { run(args, args.out, cpu::rms_norm, cuda::rms_norm); }
void norm_linear(const NormLinear& args) { run(args, args.out, cpu::norm_linear, cuda::norm_linear); }
void rotate_and_store(const RotateAndStore& args) { run(args, args.q, cpu::rotate_and_store, cuda::rotate_and_store); }
void silu_mul(const SiluMul& args) { run(args, args.out, cpu::silu_mul, cuda::silu_mul); }
void plan_decode(const PlanDecode& args) { run(args, args.seq_lens, cpu::plan_decode, cuda::plan_decode); }
void paged_attention(const PagedAttention& args) { run(args, args.out, cpu::paged_attention, cuda::paged_attention); }
void copy_blocks(const CopyBlocks& args) { run(args, args.src, cpu::copy_blocks, cuda::copy_blocks); }
void swap_blocks(const SwapBlocks& args) {
  run(args, args.src_cache.device == Device::cpu ? args.dst_cache : args.src_cache, cpu::swap_blocks,
      cuda::swap_blocks);
}
void sample(const Sample& args) { run(args, args.tokens, cpu::sample, cuda::sample); }

void set_batch_invariant(bool on) { only_batch_invariant = on; }
bool batch_invariant() { return only_batch_invariant; }

}  // namespace hybrid
