"""Rotary tables against transformers' own, for each way of stretching a context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hybrid_serve.checkpoint.hf_spec import spec_of_folder
from hybrid_serve.checkpoint.model_spec import RopeSpec
from hybrid_serve.layers.rotary import cos_sin_table, inverse_frequencies
from tiny_models import make_tiny_model

POSITIONS = 2048
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn, all keys": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, own factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.25,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_cosines_and_sines_equal_those_of_transformers(tmp_path: Path, name: str, head_dim: int) -> None:
    folder = make_tiny_model(
        tmp_path, head_dim=head_dim, rope_theta=50000.0, max_position_embeddings=POSITIONS, rope_scaling=SCALINGS[name]
    )
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    cos, sin = rotary(torch.zeros(1), torch.arange(POSITIONS)[None])
    table = cos_sin_table(spec_of_folder(folder).rope, head_dim, POSITIONS)
    half = head_dim // 2
    # The angle itself is a float32 up to 2,048: its last bit is worth 1.2e-4.
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=3e-4)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=3e-4)
    torch.testing.assert_close(table[:64, :half], cos[0, :64, :half], rtol=0, atol=1e-5)


def test_divisors_of_a_gguf_file_divide_the_frequencies() -> None:
    plain, _ = inverse_frequencies(RopeSpec(), 8)
    divided, scale = inverse_frequencies(RopeSpec(kind="factors", factors=(1.0, 2.0, 4.0, 8.0)), 8)
    assert scale == 1.0
    torch.testing.assert_close(divided * torch.tensor([1.0, 2.0, 4.0, 8.0]), plain)
