"""Sampler: logits to token ids by the parameters in the batch's columns; knows no request and keeps no state."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _kernels
from .step import Columns, Sampled, StepShape


def sample(logits: Tensor, columns: Columns, shape: StepShape, tokens: Tensor) -> Sampled:
    """``logits``: f32 [rows, vocab], overwritten. ``tokens``: i32 [rows], written."""
    rows, width, entries = shape.num_sampled, shape.logprobs_width, shape.num_adjustments
    logprobs = logprob_ids = ranks = None
    adjustments = columns["adjustments"][: 3 * entries].view(entries, 3)  # an id, the bits of what is added, flags
    if width > 0:
        logprobs = logits.new_empty(rows, width)
        logprob_ids = tokens.new_empty(rows, width)
        ranks = tokens.new_empty(rows)
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
        adjustments[:, 0],
        adjustments.view(torch.float32)[:, 1],
        adjustments[:, 2],
    )
    return Sampled(tokens, logprobs, logprob_ids, ranks)
