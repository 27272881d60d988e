"""Llama 1 to 3 and the many models of the same shape (SmolLM2): the plain decoder."""

from __future__ import annotations

from ..checkpoint.model_spec import ModelSpec
from .family import Family


def family(spec: ModelSpec) -> Family:
    bias = spec.attention_bias
    return Family("llama", qkv_bias=bias, output_bias=bias, mlp_bias=spec.mlp_bias)
