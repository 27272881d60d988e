"""WeightReader and DummyWeights: tensors by checkpoint name, as torch tensors of the model's type; know no layer.

Weights are packed one by one, so that beside the packed copy only one unpacked matrix (per loading thread) exists.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.failures import corrupt
from ..checkpoint.model_spec import ModelSpec
from ..checkpoint.tensors import Array, FloatName, TensorSource
from .family import Family
from .names import PackedLinear, expected_tensors

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,  # of a cache
}


class Weights(Protocol):
    device: torch.device  # of the tensors that are filled

    def fill(self, out: Tensor, name: str) -> None:
        """Writes the tensor ``name`` into ``out``, which has its shape."""
        ...

    def scale(self, names: tuple[str, ...]) -> float:
        """The one number of the first of these tensors that is there; 1 if none is."""
        ...


class WeightReader:
    """From a checkpoint."""

    def __init__(
        self, source: TensorSource, dtype: FloatName, device: torch.device, write: Callable[[Tensor, Array], None]
    ) -> None:
        """``write`` puts values into a tensor of ``device``."""
        self.device = device
        self._source, self._dtype, self._write = source, dtype, write

    def fill(self, out: Tensor, name: str) -> None:
        self._write(out, self._source.read(name, self._dtype))

    def scale(self, names: tuple[str, ...]) -> float:
        """Raises StartupError (HS-E022) for one that is no scale."""
        for name in names:
            if self._source.describe(name) is None:
                continue
            values = self._source.read(name, "float32").reshape(-1)
            if values.size != 1 or not 0 < values[0] < float("inf"):
                raise corrupt(self._source.label, f"tensor {name!r} is {values[:3]}, expected one positive number")
            return float(values[0])
        return 1.0


class DummyWeights:
    """Random values, N(0, 0.02), norms 1: the same for the same seed and device, whatever the order of reading."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._seed = max(seed, 0)

    def fill(self, out: Tensor, name: str) -> None:
        if out.dim() == 1 and name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        # torch's CPU generator uses 32 bits of its seed, so both go through one hash.
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        out.normal_(0.0, 0.02, generator=generator)

    def scale(self, names: tuple[str, ...]) -> float:
        return 1.0


_packing = threading.Lock()  # the kernels' thread pool serves one caller at a time


def pack(weights: Weights, linear: PackedLinear, dtype: torch.dtype) -> tuple[ops.PackedWeight, Tensor | None]:
    """The stacked parts of ``linear`` as one packed weight, and their biases as one."""
    rows = sum(count for _, count in linear.parts)
    stacked = torch.empty((rows, linear.k), dtype=dtype, device=weights.device)
    bias = torch.empty(rows, dtype=dtype, device=weights.device) if linear.bias else None
    start = 0
    for name, count in linear.parts:
        weights.fill(stacked[start : start + count], f"{name}.weight")
        if bias is not None:
            weights.fill(bias[start : start + count], f"{name}.bias")
        start += count
    with _packing:
        return ops.pack_weight(stacked), bias


def vector(weights: Weights, name: str, size: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(size, dtype=dtype, device=weights.device)
    weights.fill(out, name)
    return out


def check_tensors(spec: ModelSpec, family: Family, source: TensorSource) -> None:
    """Every tensor is there in the right shape, else StartupError (HS-E022) naming the first that is not."""
    for name, shape in expected_tensors(spec, family):
        info = source.describe(name)
        if info is None:
            raise corrupt(source.label, f"tensor {name!r} is missing")
        if info.shape != shape:
            raise corrupt(source.label, f"tensor {name!r} has shape {list(info.shape)}, the model needs {list(shape)}")
