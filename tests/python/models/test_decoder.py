"""The decoder against transformers: tiny random models of every family, float32 (B3: same logits, same tokens)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from in_process import load_runner
from ragged import Ragged
from references import VARIANTS, prompts_of, reference
from tiny_models import make_tiny_model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers_for_a_mixed_ragged_batch(tmp_path: Path, variant: str) -> None:
    family, overrides = VARIANTS[variant]
    folder = make_tiny_model(tmp_path, family, **overrides)
    prompts = prompts_of([1, 5, 33, 70, 16])
    expected = reference(folder, prompts)
    ragged = Ragged(load_runner(folder))
    sequences = [ragged.open(prompt) for prompt in prompts]
    found: list[list[Tensor]] = [[] for _ in prompts]
    # Chunks of different sizes side by side: whole prompts, parts, single rows after a prefix.
    for counts in ([1, 4, 20, 1, 16], [0, 1, 13, 64, 0], [0, 0, 0, 5, 0]):
        work = [index for index, count in enumerate(counts) if count]
        for index, logits in zip(work, ragged.logits([(sequences[i], counts[i]) for i in work]), strict=True):
            found[index].append(logits)
    for parts, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), wanted, rtol=0, atol=1e-4)
