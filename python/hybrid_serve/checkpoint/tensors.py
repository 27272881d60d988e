"""TensorSource: named tensors of a checkpoint, read one at a time; knows neither the model nor where the values go.

A 16-bit brain float has no numpy type: it travels as uint16 (the bits), and ``dtype`` says so.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FloatName = Literal["float32", "bfloat16", "float16"]
NUMPY_TYPES: dict[str, type[np.generic]] = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}

# Elements converted at a time: the working set of one piece stays in the second-level cache.
PIECE = 1 << 16


class TensorInfo(NamedTuple):
    """``dtype``: float32, bfloat16, float16, or a quantised type of GGUF (q4_1, ...)."""

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


class TensorSource(Protocol):
    """The boundary between a file format and the model: names are those of Hugging Face checkpoints."""

    @property
    def label(self) -> str:
        """What error messages call the checkpoint."""
        ...

    def describe(self, name: str) -> TensorInfo | None:
        """None if there is no such tensor. Reads headers only."""
        ...

    def read(self, name: str, dtype: FloatName) -> Array:
        """The values as ``NUMPY_TYPES[dtype]``; a view of the file (read-only) where no conversion is needed.
        Raises KeyError for an unknown name."""
        ...

    def close(self) -> None:
        """Lets go of the files; arrays read before stay valid."""
        ...


def round_to_bfloat16(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Nearest, ties to even; NaN stays NaN. Overwrites ``values``. Both flat, equal length."""
    bits = values.view(np.uint32)
    nan = np.isnan(values)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    bits += odd
    out[:] = bits.view(np.uint16)[1::2]
    if nan.any():
        out[nan] = 0x7FC0


def convert(values: Array, source: str, target: FloatName) -> Array:
    """``values`` (contiguous) of float type ``source`` as ``target``; the same array if they are equal."""
    if source == target:
        return values
    flat = values.reshape(-1)
    out = np.empty(flat.shape, NUMPY_TYPES[target])
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        if source == "bfloat16":
            wide = (piece.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            wide = piece.astype(np.float32)
        if target == "bfloat16":
            round_to_bfloat16(wide, out[start : start + PIECE])
        else:
            with np.errstate(over="ignore"):  # a value past 65504 becomes infinite in float16, as everywhere
                out[start : start + PIECE] = wide
    return out.reshape(values.shape)
