"""Graphs: steps captured as CUDA graphs, by shape; knows how to capture and replay, not what a step computes."""

from __future__ import annotations

import torch

from .step import Columns, Compute, Sampled, StepShape


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
