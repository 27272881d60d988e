// Every operation a model is made of: one argument struct and one function each. The struct is the documentation.
//
// hybrid::x checks its arguments once and picks the device; hybrid::cpu::x and hybrid::cuda::x see valid input only.
// Rules: outputs first, stream last; a "row" is one token; the last dimension is contiguous unless said otherwise;
// float tensors of one call share one dtype T in {f32, bf16, f16}, but a KV cache may be of f8, E4M3, instead (C: T or
// f8); accumulation is in f32; all products of sizes are 64-bit.
//
// Batch-invariant by construction: the value of a row depends on that row (and its KV) only. The order of every sum is
// a function of the row's own shape, never of how many rows share the call or how many threads run. Exceptions, for
// speed: on a CUDA device a 16-bit `linear` of more than a few rows may go to cuBLASLt, whose order of sums depends on
// the number of rows. set_batch_invariant(true) keeps to our own kernels. And plan_decode may be told which decodes
// begin alike: their rows' sums are then cut by what they share.
#pragma once

#include <cstdint>
#include <limits>

#include "ops/tensor.h"

namespace hybrid {

// out[r] = table[ids[r]]. A negative id, -(i + 1), stands for picked[i]: a token of the step before, which the host
// need not have seen.
struct Embedding {
  TensorView out;     // T [rows, dim]
  TensorView ids;     // i32 [rows], each in [0, vocab), or negative
  TensorView table;   // T, a packed weight (see PackWeight) of n = vocab, k = dim, or a plain [vocab, dim] tensor
  TensorView picked;  // i32 [any] or undefined
  int64_t vocab;
  Stream stream;
};

// Rearranges a weight [n, k] (row-major, as in a checkpoint) into the layout that `linear` reads.
// CPU layout: [ceil(n/32)][ceil(k/2)][32][2] for 16-bit types, [ceil(n/32)][k][32] for f32, zero-padded; k rounded up
// to a multiple of 32. A 16-bit block row of 32 x 2 is two AMX tiles side by side and two AVX-512 registers.
struct PackWeight {
  TensorView out;     // T, flat, packed_size(n, k) elements
  TensorView weight;  // T [n, k]
};
int64_t packed_size(int64_t n, int64_t k);  // elements, any dtype

// out = x @ weight^T + bias
struct Linear {
  TensorView out;     // T or f32 [rows, n] (f32 for logits)
  TensorView x;       // T [rows, k]; row stride free
  TensorView weight;  // T, packed
  TensorView bias;    // T [n] or undefined
  int64_t n, k;
  Stream stream;
};

// gate_up = x @ weight^T + bias, rounded to T; out = silu(gate_up[:, :dim]) * gate_up[:, dim:]. Same bits as linear and
// silu_mul one after the other.
struct LinearSiluMul {
  TensorView out;      // T [rows, dim]
  TensorView x;        // T [rows, k]; row stride free
  TensorView weight;   // T, packed, n = 2 * dim
  TensorView bias;     // T [2 * dim] or undefined
  TensorView gate_up;  // T [rows, 2 * dim], contiguous; scratch: contents undefined afterwards
  int64_t k;
  Stream stream;
};

// out = x / rms(x) * weight over the last dimension. With `residual`: x is added to it first, and out = norm(the sum);
// where x begins the sum, it is 0 + x, whatever was in residual.
struct RmsNorm {
  TensorView out;       // T [rows, dim]; may alias x
  TensorView x;         // T [rows, dim]; row stride free
  TensorView weight;    // T [dim]
  TensorView residual;  // T or f32 [rows, dim], or undefined. f32 keeps the sum of all layers exact.
  TensorView sum;       // like residual, where the sum goes, apart from it; undefined: to residual itself
  float eps;
  bool begins_residual;
  Stream stream;
};

// sum = residual + x; normed = norm(sum); out = normed @ product_weight^T + bias or, with gate_up, what linear_silu_mul
// makes of it. Same bits as rms_norm and that product one after the other.
struct NormLinear {
  TensorView out;                    // T or f32 [rows, n]; with gate_up T [rows, n / 2]
  TensorView x;                      // T [rows, k]; row stride free
  TensorView weight, residual, sum;  // of the norm, as in RmsNorm; sum is needed
  TensorView normed;                 // T [rows, k], contiguous; scratch: contents undefined afterwards
  TensorView product_weight;         // T, packed
  TensorView bias;                   // T [n] or undefined
  TensorView gate_up;                // T [rows, n], contiguous, scratch as well; undefined: no silu_mul
  int64_t n, k;
  float eps;
  bool begins_residual;
  Stream stream;
};

// All that happens to q, k and v between their product and attention: the RMS norm of every head of q and k, where the
// model has one (Qwen3); the rotation of both in "half" (NeoX) layout, pairs (i, i + rotary_dim / 2); and the new
// keys and values into the paged cache. q is rewritten in place, k and v are only read. slot = block * block_size +
// offset; slot < 0: padding, not stored. On a device positions and slots come by a copy, never from a kernel: they are
// read while the kernels before still run (cuda/launch.cuh). An f8 cache keeps x / scale, rounded from T, where x is
// what a cache of type T would; beyond +-448 it stops there.
struct RotateAndStore {
  TensorView q;                 // T [rows, heads, dim]; row and head stride free
  TensorView k_cache, v_cache;  // C [blocks, kv_heads, block_size, dim]; block stride free
  TensorView k, v;              // T [rows, kv_heads, dim]; row and head stride free
  TensorView cos_sin;           // f32 [max_positions, rotary_dim]: first half cos, second half sin (yarn's scale in it)
  TensorView positions;         // i32 [rows]
  TensorView slots;             // i64 [rows]
  TensorView q_weight, k_weight;  // T [dim], the norms' weights; both or neither
  float eps;
  Stream stream;
  float k_scale = 1.0f, v_scale = 1.0f;  // of an f8 cache; 1 with others
};

// out = silu(x[:, :dim]) * x[:, dim:]
struct SiluMul {
  TensorView out;  // T [rows, dim]
  TensorView x;    // T [rows, 2 * dim]
  Stream stream;
};

// Divides the decodes of a step over the device, once for all layers: paged_attention of each takes `plan`. Everything
// that the plan is made of, and all keys and values but the decodes' newest, must have been written by work queued
// before this op, and stay as it is until the last layer is done. Does nothing on a CPU.
struct PlanDecode {
  TensorView plan;                             // i32 [decode_plan_size(max_decodes) or more], 16-byte aligned
  TensorView query_start, seq_lens, kv_start;  // as in PagedAttention
  TensorView num_decodes;                      // i64 [1]
  int64_t max_decodes;
  int64_t heads, kv_heads, head_dim;  // of the model
  // Decodes whose sequences begin with the same cache blocks, so that these are read once for all of them: group g of
  // num_prefixes is the decodes [prefix_start[g], prefix_start[g + 1]), which have the first prefix_lens[g] tokens in
  // common, none of them the newest. The groups are all decodes, in order; one of decodes with nothing in common has 0.
  // Undefined: nothing is shared. A row's sum is then cut by what others share with it: no bits may be promised.
  TensorView prefix_start;  // i32 [num_prefixes + 1 or more]
  TensorView prefix_lens;   // i32 [num_prefixes or more]
  TensorView num_prefixes;  // i64 [1]
  int64_t block_size = 0;   // of the cache; used with the above only
  Stream stream;
};
int64_t decode_plan_size(int64_t max_decodes);  // elements

// Causal attention of ragged queries over the paged cache (K and V of the new tokens are already stored).
// Sequence s owns query rows [query_start[s], query_start[s+1]), the last of which sits at position seq_lens[s] - 1,
// and the cache blocks kv_blocks[kv_start[s] .. kv_start[s+1]).
struct PagedAttention {
  TensorView out, q;            // T [rows, heads, dim]; row stride free
  TensorView k_cache, v_cache;  // C [blocks, kv_heads, block_size, dim]; block stride free
  TensorView query_start;       // i32 [seqs + 1]
  TensorView seq_lens;          // i32 [seqs], new tokens included
  TensorView kv_start;          // i32 [seqs + 1]
  TensorView kv_blocks;         // i32 [kv_start[seqs]]
  // The first num_decodes sequences are decodes: one query row each, worked on by another kernel where that pays.
  // Undefined: none are. On a device the value is read there; what is launched depends on the two bounds alone.
  TensorView num_decodes;                                                      // i64 [1]
  int64_t max_decodes = 0, max_prompts = std::numeric_limits<int64_t>::max();  // at most so many have query rows
  int64_t max_query_len;
  float scale;
  TensorView plan;  // i32, of plan_decode with the same columns, bounds and heads; undefined: the call makes its own
  bool shares_prefixes = false;  // whether plan_decode was given some
  Stream stream;
  float k_scale = 1.0f, v_scale = 1.0f;  // as in RotateAndStore
};

// Copies whole cache blocks (all layers, K and V): cache[dst[i]] = cache[src[i]]. Sources and destinations are
// disjoint.
struct CopyBlocks {
  TensorView cache;     // any dtype [blocks, elements of a block]
  TensorView src, dst;  // i32 [pairs]
  Stream stream;
};

// Copies whole cache blocks between the host and a device: dst_cache[dst[i]] = src_cache[src[i]], each at most once.
// Blocks that are neighbours on both sides travel as one piece. Host memory is to be pinned: with other memory the call
// waits for the copies.
struct SwapBlocks {
  TensorView dst_cache, src_cache;  // any dtype [blocks, elements of a block]; one on a device, or both on the host
  TensorView dst, src;              // i32 or i64 [pairs], on the host, read before the call returns
  Stream stream;
};

// Picks one token a row. Order of work, as in the field: log-probabilities of the raw logits (when asked for), allowed
// set, repetition penalty, additive adjustments, then temperature (0: argmax, lowest id wins a tie), top-k, top-p,
// min-p, and a draw by Gumbel noise from Philox4x32-10 (ops/philox.h), a function of (seed, position, token id) alone,
// so preemption, replay and batch mates cannot change it. Temperatures below 1e-5 count as 0; a NaN logit as -inf;
// where everything is -inf, the lowest id that is allowed is picked. Adjustments of row r are entries [adjust_start[r],
// adjust_start[r+1]): logits[id] gets the repetition penalty if flag 1, then + add; if any entry of the row has flag 2
// the row may only pick ids that have flag 2.
struct Sample {
  TensorView tokens;       // i32 [rows]
  TensorView logprobs;     // f32 [rows, width] or undefined: sampled token first, then the top ones, descending
  TensorView logprob_ids;  // i32 [rows, width]; -1 where a row asked for fewer
  TensorView ranks;        // i32 [rows]: 1 + number of tokens whose raw logit is larger than the sampled one's
  TensorView logits;       // f32 [rows, vocab]; scratch, overwritten
  TensorView temperature, top_p, min_p, repetition_penalty;  // f32 [rows]
  TensorView top_k;                                          // i32 [rows]; <= 0: off
  TensorView seeds;                                          // i64 [rows] (the bits of a u64)
  TensorView positions;                                      // i32 [rows]: position of the token that is picked
  TensorView num_logprobs;  // i32 [rows]; -1: none, 0: the sampled token only, n: and the n most likely
  TensorView adjust_start;  // i32 [rows + 1]
  TensorView adjust_ids;    // i32 [entries], of any stride, as the next two, with the same one
  TensorView adjust_add;    // f32 [entries]
  TensorView adjust_flags;  // i32 [entries]
  Stream stream;
};

void embedding(const Embedding&);
void pack_weight(const PackWeight&);
void linear(const Linear&);
void linear_silu_mul(const LinearSiluMul&);
void rms_norm(const RmsNorm&);
void norm_linear(const NormLinear&);
void rotate_and_store(const RotateAndStore&);
void silu_mul(const SiluMul&);
void plan_decode(const PlanDecode&);
void paged_attention(const PagedAttention&);
void copy_blocks(const CopyBlocks&);
void swap_blocks(const SwapBlocks&);
void sample(const Sample&);

void set_batch_invariant(bool on);  // of the process; off at first
bool batch_invariant();

namespace cpu {
void embedding(const Embedding&);
void pack_weight(const PackWeight&);
void linear(const Linear&);
void linear_silu_mul(const LinearSiluMul&);
void rms_norm(const RmsNorm&);
void norm_linear(const NormLinear&);
void rotate_and_store(const RotateAndStore&);
void silu_mul(const SiluMul&);
void plan_decode(const PlanDecode&);
void paged_attention(const PagedAttention&);
void copy_blocks(const CopyBlocks&);
void swap_blocks(const SwapBlocks&);
void sample(const Sample&);
}  // namespace cpu

namespace cuda {
bool is_built();  // whether these are kernels, or stand-ins that throw
void embedding(const Embedding&);
void pack_weight(const PackWeight&);
void linear(const Linear&);
void linear_silu_mul(const LinearSiluMul&);
void rms_norm(const RmsNorm&);
void norm_linear(const NormLinear&);
void rotate_and_store(const RotateAndStore&);
void silu_mul(const SiluMul&);
void plan_decode(const PlanDecode&);
void paged_attention(const PagedAttention&);
void copy_blocks(const CopyBlocks&);
void swap_blocks(const SwapBlocks&);
void sample(const Sample&);
}  // namespace cuda

}  // namespace hybrid
