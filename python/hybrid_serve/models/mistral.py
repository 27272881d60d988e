"""Mistral: the plain decoder. Its sliding window is a limit on the context length (see runner/limits.py)."""

from __future__ import annotations

from ..checkpoint.model_spec import ModelSpec
from .family import Family


def family(_: ModelSpec) -> Family:
    return Family("mistral")
