// How the prefill kernels divide their work.
//
// The query heads of a KV head are packed: row r of a sequence is head r % group of query token r / group. A share is
// a fixed number of such rows of one KV head. Shares are found on the device: the host knows the number of rows only.
#pragma once

#include "attention.cuh"
#include "decode_plan.cuh"

namespace hybrid::cuda {

// Packed rows [row0, row0 + share_rows) of a sequence and KV head.
struct Share {
  int head;           // -1: there are no more
  int row0, rows;     // `rows`: of the whole sequence, packed
  int kv_start;       // its first cache block is kv_blocks[kv_start]
  int position;       // of the sequence's first query row
  int visible;        // KV tokens that the last row of the share sees
  int part, parts;    // of prefixes: query row r sums to partial result r * parts + part
  int64_t first_row;  // of q and out
};

// The prompts of a call and how many shares a KV head has at most. Sequences own consecutive share indices, at least
// as many as they need: floor sums bound the ceilings.
template <int share_rows>
struct Prompts {
  static constexpr bool is_partial = false;  // what rows sum to is their result

  const int32_t* starts;  // of the first prompt
  int first_seq, seqs, group;

  template <class Params>
  __device__ explicit Prompts(const Params& p)
      : first_seq(p.num_decodes != nullptr ? static_cast<int>(*p.num_decodes) : 0), seqs(p.seqs - first_seq) {
    starts = p.query_start + first_seq, group = p.group;
  }

  __device__ int first_share(int s) const { return (starts[s] - starts[0]) * group / share_rows + s; }

  // By one warp. Sequences at the end that own nothing have no share.
  __device__ int shares() const {
    if (seqs <= 0 || starts[seqs] == starts[0]) return 0;
    const int last = starts[seqs] - 1;
    const int count = last_not_above(last, seqs, [&](int s) { return starts[s]; }) + 1;
    return (last + 1 - starts[0]) * group / share_rows + count;
  }

  // By one warp; false if nobody needs this index.
  template <class Params>
  __device__ bool find(const Params& p, int index, int head, Share& share) const {
    if (seqs <= 0) return false;
    const int s = last_not_above(index, seqs, [&](int i) { return first_share(i); });
    const int queries = starts[s + 1] - starts[s];
    const int row0 = (index - first_share(s)) * share_rows;
    if (row0 >= queries * group) return false;
    share.head = head;
    share.row0 = row0;
    share.rows = queries * group;
    share.kv_start = p.kv_start[first_seq + s];
    share.position = p.seq_lens[first_seq + s] - queries;
    share.visible = share.position + (min(share.rows, share.row0 + share_rows) - 1) / group + 1;
    share.first_row = starts[s];
    return true;
  }
};

// The beginnings that decodes share, as plan_decode divided them: every row of a share sees all its tokens.
struct Prefixes {
  static constexpr bool is_partial = true;

  PlanView plan;

  template <class Params>
  __device__ explicit Prefixes(const Params& p) : plan(p.plan) {}

  __device__ int shares() const { return __ldcg(plan.prefix_shares); }

  template <class Params>
  __device__ bool find(const Params&, int index, int head, Share& share) const {
    if (index < 0 || index >= shares()) return false;
    const int4* from = reinterpret_cast<const int4*>(plan.prefix_share + index);
    const int4 a = __ldcg(from), b = __ldcg(from + 1);
    share = {head, a.y, a.z, a.w, b.x, b.x, b.y, __ldcg(plan.row_parts), a.x};
    return true;
  }
};

// Where the partial result of a packed row of a share of prefixes goes: its sums, and its largest score and sum of
// weights.
struct PartRow {
  float* sums;
  float2* state;
};
template <class Params>
__device__ inline PartRow part_row(const Params& p, const Share& share, int packed) {
  const int heads = p.kv_heads * p.group, head = share.head * p.group + packed % p.group;
  float* part =
      p.prefixes + ((share.first_row + packed / p.group) * share.parts + share.part) * part_floats(heads, p.dim);
  return {part + head * p.dim, reinterpret_cast<float2*>(part + heads * p.dim) + head};
}

}  // namespace hybrid::cuda
