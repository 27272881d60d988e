// How the prefill kernels divide their work.
//
// The query heads of a KV head are packed: row r of a sequence is head r % group of query token r / group. A share is
// a fixed number of such rows of one KV head. Shares are found on the device: the host knows the number of rows only.
#pragma once

#include "attention.cuh"

namespace hybrid::cuda {

// Packed rows [row0, row0 + share_rows) of a sequence and KV head.
struct Share {
  int seq, head;
  int row0, rows;     // `rows`: of the whole sequence, packed
  int position;       // of the sequence's first query row
  int visible;        // KV tokens that the last row of the share sees
  int64_t first_row;  // of q and out
};

// The prompts of a call and how many shares a KV head has at most. Sequences own consecutive share indices, at least
// as many as they need: floor sums bound the ceilings.
template <int share_rows>
struct Prompts {
  const int32_t* starts;  // of the first prompt
  int first_seq, seqs, group;

  template <class T>
  __device__ explicit Prompts(const AttentionParams<T>& p)
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
  template <class T>
  __device__ bool find(const AttentionParams<T>& p, int index, int head, Share& share) const {
    if (seqs <= 0) return false;
    const int s = last_not_above(index, seqs, [&](int i) { return first_share(i); });
    const int queries = starts[s + 1] - starts[s];
    const int row0 = (index - first_share(s)) * share_rows;
    if (row0 >= queries * group) return false;
    share.seq = first_seq + s;
    share.head = head;
    share.row0 = row0;
    share.rows = queries * group;
    share.position = p.seq_lens[share.seq] - queries;
    share.visible = share.position + (min(share.rows, share.row0 + share_rows) - 1) / group + 1;
    share.first_row = starts[s];
    return true;
  }
};

}  // namespace hybrid::cuda
