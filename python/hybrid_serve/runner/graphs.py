"""Graphs: steps captured as CUDA graphs, by shape; knows how to capture and replay, not what a step computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .step import Columns, Compute, Sampled, StepShape


class PadSizes(NamedTuple):
    """What the core pads batches to, so that they are of few shapes; empty: it does not."""

    decodes: tuple[int, ...] = ()
    mixed_seqs: tuple[int, ...] = ()
    mixed_tokens: tuple[int, ...] = ()


DECODE_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, 513, 32), 640, 768, 896, 1024)
MIXED_SEQ_SIZES = (4, 16, 64, 256, 1024)
# Padding costs a large model a few percent of a step; every size costs its capture once.
MIXED_TOKEN_SIZES = (*range(16, 129, 16), *range(160, 513, 32), *range(576, 1025, 64), *range(1152, 2049, 128))


def pad_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> PadSizes:
    return PadSizes(
        _up_to(DECODE_SIZES, max_num_seqs),
        _up_to(MIXED_SEQ_SIZES, max_num_seqs),
        _up_to(MIXED_TOKEN_SIZES, max_num_batched_tokens),
    )


def _up_to(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    """Those below ``limit``, and then ``limit`` itself, if it is not beyond the largest."""
    return (*(size for size in sizes if size < limit), *([limit] if limit <= sizes[-1] else []))


class Graphs:
    """A shape's first step runs kernel by kernel, the second one is captured, those after it are replayed: nobody waits
    for shapes that never come back, and the first run lets the kernels take the scratch they need."""

    def __init__(self) -> None:
        self._seen: set[StepShape] = set()
        self._captured: dict[StepShape, tuple[torch.cuda.CUDAGraph, Sampled]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one memory for all: they run one at a time

    def run(self, compute: Compute, columns: Columns, shape: StepShape) -> Sampled:
        """On the current stream, which must not be the default one."""
        found = self._captured.get(shape)
        if found is None:
            if shape not in self._seen or shape.num_copies > 0:
                self._seen.add(shape)
                return compute(columns, shape)
            found = self._captured[shape] = self._capture(compute, columns, shape)
        graph, sampled = found
        graph.replay()
        return sampled

    def _capture(self, compute: Compute, columns: Columns, shape: StepShape) -> tuple[torch.cuda.CUDAGraph, Sampled]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            sampled = compute(columns, shape)
        finally:
            graph.capture_end()
        return graph, sampled
