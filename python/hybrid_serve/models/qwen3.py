"""Qwen3: every query and key head is normalised before it is rotated."""

from __future__ import annotations

from ..checkpoint.model_spec import ModelSpec
from .family import Family


def family(spec: ModelSpec) -> Family:
    bias = spec.attention_bias
    return Family("qwen3", qkv_bias=bias, output_bias=bias, head_norm=True)
