// The one place that asks which device a tensor is on.
#include "ops/ops.h"

#include "common/check.h"
#include "ops/check.h"
#include "ops/dispatch.h"

namespace hybrid {

void not_a_float_type(DType dtype) { throw InternalError(concat("kernel called with ", name_of(dtype))); }

// Of cuda/decode_plan.cuh, for every device: a fixed part and 32 units of 4 numbers a sequence.
int64_t decode_plan_size(int64_t max_decodes) { return 1024 + 128 * max_decodes; }

namespace {

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
void rms_norm(const RmsNorm& args) { run(args, args.out, cpu::rms_norm, cuda::rms_norm); }
void rotary(const Rotary& args) { run(args, args.q, cpu::rotary, cuda::rotary); }
void silu_mul(const SiluMul& args) { run(args, args.out, cpu::silu_mul, cuda::silu_mul); }
void store_kv(const StoreKv& args) { run(args, args.k, cpu::store_kv, cuda::store_kv); }
void plan_decode(const PlanDecode& args) { run(args, args.seq_lens, cpu::plan_decode, cuda::plan_decode); }
void paged_attention(const PagedAttention& args) { run(args, args.out, cpu::paged_attention, cuda::paged_attention); }
void copy_blocks(const CopyBlocks& args) { run(args, args.src, cpu::copy_blocks, cuda::copy_blocks); }
void sample(const Sample& args) { run(args, args.tokens, cpu::sample, cuda::sample); }

}  // namespace hybrid
