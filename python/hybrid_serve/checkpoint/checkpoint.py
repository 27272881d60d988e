"""Checkpoint: a model's metadata and its tensors, whichever form the files have."""

from __future__ import annotations

from dataclasses import dataclass

from .gguf import GgufFile
from .gguf_source import GgufSource
from .gguf_spec import spec_of_gguf
from .hf_spec import spec_of_folder
from .hub import ResolvedModel
from .model_spec import ModelSpec
from .safetensors import SafetensorsSource
from .tensors import TensorSource


@dataclass(frozen=True)
class Checkpoint:
    """``source`` is None where only the shape of the model is wanted (load format ``dummy``)."""

    spec: ModelSpec
    source: TensorSource | None


def open_checkpoint(resolved: ResolvedModel, *, with_tensors: bool = True) -> Checkpoint:
    """Reads and checks all headers, no tensor. Raises StartupError: HS-E022 corrupt, HS-E023 not supported."""
    if resolved.kind == "gguf":
        file = GgufFile(resolved.path)
        spec = spec_of_gguf(file)
        return Checkpoint(spec, GgufSource(file, spec) if with_tensors else None)
    spec = spec_of_folder(resolved.path)
    return Checkpoint(spec, SafetensorsSource(resolved.path) if with_tensors else None)
