"""The decoder against transformers: tiny random models of every family, float32 (B3: same logits, same tokens)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from in_process import load_runner
from ragged import Ragged
from tiny_models import FAMILIES, make_tiny_model

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied, one KV head": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "odd sizes": ("llama", {"hidden_size": 72, "head_dim": 24, "num_attention_heads": 3, "num_key_value_heads": 1}),
}


def reference(folder: Path, prompts: list[list[int]]) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [
        [(17 * index + 31 * position + position**2) % 509 + 3 for position in range(length)]
        for index, length in enumerate(lengths)
    ]


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
