"""What transformers says of tiny models, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_models import FAMILIES

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
