"""ArenaViews: the columns of one batch arena as tensors over its memory; made once, sliced every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Buffer

NUM_DECODES = 3  # entry of the header column, as in cpp/core/batch.h
Layout = Mapping[str, tuple[int, str, int]]  # column -> (byte offset, numpy type, capacity)


class Batch(Protocol):
    """What the runner reads of a scheduled batch: sizes, and which arena holds its columns."""

    @property
    def step(self) -> int: ...
    @property
    def arena(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_seqs(self) -> int: ...
    @property
    def num_decodes(self) -> int: ...
    @property
    def num_sampled(self) -> int: ...
    @property
    def max_query_len(self) -> int: ...
    @property
    def num_copies(self) -> int: ...
    @property
    def num_adjustments(self) -> int: ...


class ArenaViews:
    """``arrays`` and ``tensors`` by column name: the same memory seen by numpy and by torch."""

    def __init__(self, arena: Buffer, layout: Layout) -> None:
        """``arena``: writable, at least as long as the layout needs. Raises ValueError otherwise."""
        memory = memoryview(arena).cast("B")
        if memory.readonly:
            raise ValueError("an arena must be writable")
        self.arrays: dict[str, NDArray[Any]] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, (offset, type_name, capacity) in layout.items():
            dtype = np.dtype(type_name)
            end = offset + capacity * dtype.itemsize
            if end > memory.nbytes:
                raise ValueError(f"column {name} ends at byte {end} of an arena of {memory.nbytes}")
            array = np.frombuffer(memory, dtype, capacity, offset)
            self.arrays[name] = array
            self.tensors[name] = torch.from_numpy(array)
