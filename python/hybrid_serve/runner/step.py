"""What one step needs to know of its batch, and what it gives. Sizes and tensors only; no device, no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .arena import ArenaViews, Batch

Columns = Mapping[str, Tensor]


class StepShape(NamedTuple):
    """The sizes that a step's launches depend on: two steps of one shape launch the same kernels with the same
    arguments, whatever their columns hold."""

    num_tokens: int
    num_seqs: int
    num_sampled: int
    max_decodes: int
    max_prompts: int
    max_query_len: int
    logprobs_width: int  # 1 + the most log-probabilities that any row wants; 0: none are wanted
    num_blocks: int  # entries of kv_blocks
    num_adjustments: int  # entries of adjust_ids
    num_copies: int
    shares_prefixes: bool  # whether decodes that begin with the same blocks are listed


class Sampled(NamedTuple):
    """What a step computes, on its device: one row per sampled row."""

    tokens: Tensor  # i32 [rows]
    logprobs: Tensor | None = None  # f32 [rows, width], the sampled token's first
    logprob_ids: Tensor | None = None  # i32 [rows, width]; -1 where a row asked for fewer
    ranks: Tensor | None = None  # i32 [rows], 1 is the most likely


class StepResult(NamedTuple):
    """The same in the host's memory; logprobs, logprob_ids and ranks are None if no row asked."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32] | None = None
    logprob_ids: NDArray[np.int32] | None = None
    ranks: NDArray[np.int32] | None = None


class Pending(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Waits for it. Called once, in the order of ``submit``."""
        ...


class Done(NamedTuple):
    """A step that was over before ``submit`` returned."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


Compute = Callable[[Columns, StepShape], Sampled]


def exact_shape(batch: Batch, views: ArenaViews) -> StepShape:
    """Of the batch without any padding."""
    return StepShape(
        batch.num_tokens,
        batch.num_seqs,
        batch.num_sampled,
        batch.num_decodes,
        batch.num_seqs - batch.num_decodes,
        batch.max_query_len,
        _logprobs_width(batch, views),
        int(views.arrays["kv_start"][batch.num_seqs]),
        batch.num_adjustments,
        batch.num_copies,
        batch.num_prefixes > 0,
    )


def padded_shape(batch: Batch, views: ArenaViews) -> StepShape:
    """Of the batch as the core padded it: few shapes for many batches. Ragged columns count with their capacity."""
    decodes_only = batch.num_decodes == batch.num_seqs
    return StepShape(
        batch.padded_tokens,
        batch.padded_seqs,
        batch.padded_seqs,
        batch.padded_seqs,
        0 if decodes_only else batch.padded_seqs,
        1 if decodes_only else batch.padded_tokens,
        _logprobs_width(batch, views),
        views.arrays["kv_blocks"].size,
        views.arrays["adjust_ids"].size,
        batch.num_copies,
        batch.num_prefixes > 0,
    )


def _logprobs_width(batch: Batch, views: ArenaViews) -> int:
    return 1 + int(views.arrays["num_logprobs"][: batch.num_sampled].max(initial=-1))
