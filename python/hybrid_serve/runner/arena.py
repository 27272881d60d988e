"""ArenaViews: the columns of one batch arena as arrays and tensors over its memory; made once, sliced every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Buffer

Layout = Mapping[str, tuple[int, str, int]]  # column -> (byte offset, numpy type, capacity)
NUM_DECODES, NUM_PREFIXES = 3, 14  # entries of the header column, as in cpp/core/batch.h
_TYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


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
    def num_swap_outs(self) -> int: ...
    @property
    def num_swap_ins(self) -> int: ...
    @property
    def num_adjustments(self) -> int: ...
    @property
    def num_prefixes(self) -> int: ...
    @property
    def bytes_used(self) -> int: ...
    @property
    def padded_tokens(self) -> int: ...
    @property
    def padded_seqs(self) -> int: ...
    @property
    def is_padded(self) -> bool: ...


class ArenaViews:
    """One arena of the host: ``memory``, u8, and ``arrays`` and ``tensors`` by column name over it."""

    def __init__(self, arena: Buffer, layout: Layout) -> None:
        """``arena``: writable, at least as long as the layout needs. Raises ValueError otherwise."""
        buffer = memoryview(arena).cast("B")
        if buffer.readonly:
            raise ValueError("an arena must be writable")
        self.memory = torch.from_numpy(np.frombuffer(buffer, np.uint8))
        self.tensors = columns_of(self.memory, layout)
        self.arrays: dict[str, NDArray[Any]] = {name: column.numpy() for name, column in self.tensors.items()}


def columns_of(memory: Tensor, layout: Layout) -> dict[str, Tensor]:
    """``memory``: u8 on any device, laid out as an arena. Raises ValueError if it is shorter than the layout."""
    columns = {}
    for name, (offset, type_name, capacity) in layout.items():
        dtype = np.dtype(type_name)
        end = offset + capacity * dtype.itemsize
        if end > memory.numel():
            raise ValueError(f"column {name} ends at byte {end} of an arena of {memory.numel()}")
        columns[name] = memory[offset:end].view(_TYPES[dtype.name])
    return columns


def write_nobodys_batch(columns: Mapping[str, Tensor], is_decode: bool) -> None:
    """As the core pads (``BatchWriter::pad``), behind one token at position 0, so that every kernel has a row to work
    on. It is stored nowhere, reads block 0, which belongs to nobody just now, and what it picks is not read."""
    for name, column in columns.items():
        column.fill_({"slots": -1, "num_logprobs": -1, "top_p": 1, "repetition_penalty": 1}.get(name, 0))
    columns["header"][NUM_DECODES] = int(is_decode)
    columns["seq_lens"][0] = 1
    columns["query_start"][1:] = 1
    columns["kv_start"][1:] = 1
