"""The model families, by the name in ``ModelSpec.family``. Adding one: its file here, its names in checkpoint/."""

from __future__ import annotations

from collections.abc import Callable

from ..checkpoint.model_spec import ModelSpec
from . import llama, mistral, qwen2, qwen3
from .family import Family

FAMILIES: dict[str, Callable[[ModelSpec], Family]] = {
    "llama": llama.family,
    "mistral": mistral.family,
    "qwen2": qwen2.family,
    "qwen3": qwen3.family,
}


def family_of(spec: ModelSpec) -> Family:
    return FAMILIES[spec.family](spec)
