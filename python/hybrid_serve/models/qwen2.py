"""Qwen2 and Qwen2.5: q, k and v always have a bias, nothing else has."""

from __future__ import annotations

from ..checkpoint.model_spec import ModelSpec
from .family import Family


def family(_: ModelSpec) -> Family:
    return Family("qwen2", qkv_bias=True)
