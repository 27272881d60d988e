"""What one step needs to know of its batch, and what it gives. Sizes and tensors only; no device, no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .arena import ArenaViews, Batch, Layout
from .pad_sizes import PadSizes

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
    num_adjustments: int  # entries of the column, three words each
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
Swap = Callable[[Columns, Batch], None]  # the columns on the host


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
        int(views.arrays["adjust_start"][batch.num_sampled]) if batch.num_adjustments else 0,
        batch.num_copies,
        batch.num_prefixes > 0,
    )


def padded_shape(batch: Batch, views: ArenaViews) -> StepShape:
    """Of the batch as the core padded it: few shapes for many batches. Ragged columns count with their capacity."""
    decodes_only = batch.num_decodes == batch.num_seqs
    entries = views.arrays["kv_blocks"].size, views.arrays["adjustments"].size // 3
    shape = _shape_of_size(batch.padded_tokens, batch.padded_seqs, decodes_only, *entries)
    return shape._replace(
        logprobs_width=_logprobs_width(batch, views),
        num_copies=batch.num_copies,
        shares_prefixes=batch.num_prefixes > 0,
    )


def likely_shapes(sizes: PadSizes, layout: Layout) -> list[StepShape]:
    """What ``padded_shape`` gives for batches of these sizes, the most likely first: decodes, then pieces of prompts
    beside few sequences. Without log-probabilities, which few ask for, and shared beginnings, which few have."""
    entries = layout["kv_blocks"][2], layout["adjustments"][2] // 3
    shapes = [_shape_of_size(size, size, True, *entries) for size in sizes.decodes]
    for fewer, seqs in zip((0, *sizes.mixed_seqs), sizes.mixed_seqs, strict=False):
        # So many sequences mean more than ``fewer``, of which each has a token.
        shapes += [_shape_of_size(tokens, seqs, False, *entries) for tokens in sizes.mixed_tokens if tokens > fewer]
    return shapes


def _shape_of_size(tokens: int, seqs: int, decodes_only: bool, num_blocks: int, num_adjustments: int) -> StepShape:
    prompts, query_len = (0, 1) if decodes_only else (seqs, tokens)
    return StepShape(tokens, seqs, seqs, seqs, prompts, query_len, 0, num_blocks, num_adjustments, 0, False)


def _logprobs_width(batch: Batch, views: ArenaViews) -> int:
    return 1 + int(views.arrays["num_logprobs"][: batch.num_sampled].max(initial=-1))
