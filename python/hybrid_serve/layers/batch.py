"""BatchView: one step's columns as tensors, as the layers need them; owns nothing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import ops


class Prefixes(NamedTuple):
    """Decodes that begin with the same cache blocks: the first ``lens[g]`` tokens of the sequences of decodes
    [start[g], start[g + 1]), for ``num`` groups, which are all decodes."""

    start: Tensor  # i32
    lens: Tensor  # i32
    num: Tensor  # i64 [1], of groups
    block_size: int


class BatchView(NamedTuple):
    """T tokens of S sequences, R of them sampled. Sequence s owns query rows [query_start[s], query_start[s + 1]) and
    cache blocks kv_blocks[kv_start[s] .. kv_start[s + 1]); the first ``num_decodes`` sequences are decodes: one
    row each, the token that was picked last. Columns of a captured step are padded: the last sequences may own nothing,
    the last tokens may belong to nobody and have slot -1."""

    token_ids: Tensor  # i32 [T]; -(row + 1): what row ``row`` of the step before picked
    picked: Tensor  # i32, of the step before
    positions: Tensor  # i32 [T]
    slots: Tensor  # i64 [T], where the tokens' keys and values go
    query_start: Tensor  # i32 [S + 1]
    seq_lens: Tensor  # i32 [S], these tokens included
    kv_start: Tensor  # i32 [S + 1]
    kv_blocks: Tensor  # i32
    sample_rows: Tensor | None  # i32 [R], rows of T; None: all of them
    num_decodes: Tensor  # i64 [1]
    max_decodes: int  # bounds known on the host, see ops.h
    max_prompts: int
    max_query_len: int
    prefixes: Prefixes | None = None  # None: each decode reads all its tokens itself
    plan: Tensor | None = None  # of the decodes, for all layers

    def with_plan(self, num_heads: int, num_kv_heads: int, head_dim: int) -> BatchView:
        """Plans on the device, from the columns above: call it behind whatever writes them or copies cache blocks."""
        plan = ops.plan_decode(
            self.query_start,
            self.seq_lens,
            self.kv_start,
            self.num_decodes,
            self.max_decodes,
            num_heads,
            num_kv_heads,
            head_dim,
            *(self.prefixes or ()),
        )
        return self._replace(plan=plan)
