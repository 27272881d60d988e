"""Sampler: logits to token ids by the parameters in the batch's columns; knows no request and keeps no state."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _kernels
from .arena import ArenaViews, Batch


class StepResult(NamedTuple):
    """One row per sampled row of the batch. ``width`` is 1 + the most log-probabilities that any row asked for;
    logprobs, logprob_ids and ranks are None if no row asked."""

    tokens: NDArray[np.int32]  # [rows]
    logprobs: NDArray[np.float32] | None = None  # [rows, width], the sampled token's first
    logprob_ids: NDArray[np.int32] | None = None  # [rows, width]; -1 where a row asked for fewer
    ranks: NDArray[np.int32] | None = None  # [rows], 1 is the most likely


def sample(logits: Tensor, views: ArenaViews, batch: Batch) -> tuple[Tensor, StepResult]:
    """``logits``: f32 [R, vocab], overwritten. Returns the tokens as a tensor too, for the next step to refer to."""
    rows, entries, columns = batch.num_sampled, batch.num_adjustments, views.tensors
    tokens = torch.empty(rows, dtype=torch.int32)
    logprobs = logprob_ids = ranks = None
    most = int(views.arrays["num_logprobs"][:rows].max(initial=-1))
    if most >= 0:
        logprobs = torch.empty((rows, 1 + most), dtype=torch.float32)
        logprob_ids = torch.empty((rows, 1 + most), dtype=torch.int32)
        ranks = torch.empty(rows, dtype=torch.int32)
    _kernels.sample(
        tokens,
        logprobs,
        logprob_ids,
        ranks,
        logits,
        columns["temperature"][:rows],
        columns["top_p"][:rows],
        columns["min_p"][:rows],
        columns["repetition_penalty"][:rows],
        columns["top_k"][:rows],
        columns["seeds"][:rows],
        columns["sample_positions"][:rows],
        columns["num_logprobs"][:rows],
        columns["adjust_start"][: rows + 1],
        columns["adjust_ids"][:entries],
        columns["adjust_add"][:entries],
        columns["adjust_flags"][:entries],
    )
    if logprobs is None or logprob_ids is None or ranks is None:
        return tokens, StepResult(tokens.numpy())
    return tokens, StepResult(tokens.numpy(), logprobs.numpy(), logprob_ids.numpy(), ranks.numpy())
