"""Padded batches as a GPU runs them, on a CPU: every shape that is captured ahead, and the tokens of plain steps (B20).

Its kernels check sizes as the CUDA ones do, and skip the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import Buffer

from hybrid_serve.runner.arena import ArenaViews, Batch, Layout, columns_of, write_nobodys_batch
from hybrid_serve.runner.device import CpuDevice
from hybrid_serve.runner.model_runner import ModelRunner
from hybrid_serve.runner.pad_sizes import PadSizes, pad_sizes
from hybrid_serve.runner.step import Compute, Done, StepResult, StepShape, Swap, likely_shapes, padded_shape
from in_process import Generator, load_runner
from references import prompts_of
from tiny_models import make_tiny_model


class PaddingDevice(CpuDevice):
    def steps(self, arenas: Sequence[Buffer], layout: Layout, pad_sizes: PadSizes) -> PaddedSteps:  # type: ignore[override]
        return PaddedSteps([ArenaViews(arena, layout) for arena in arenas], layout, pad_sizes)


class PaddedSteps:
    """As ``CudaSteps``: over a copy of what a batch uses, in its padded shape. ``shapes``: of all steps."""

    def __init__(self, views: Sequence[ArenaViews], layout: Layout, pad_sizes: PadSizes) -> None:
        self._views, self._memory = views, torch.zeros_like(views[0].memory)
        self._columns = columns_of(self._memory, layout)
        self._ahead = likely_shapes(pad_sizes, layout)
        self.shapes: list[StepShape] = []

    def submit(self, batch: Batch, compute: Compute, swap: Swap) -> Done:
        assert batch.is_padded
        views = self._views[batch.arena]
        self._memory[: batch.bytes_used] = views.memory[: batch.bytes_used]
        self.shapes.append(padded_shape(batch, views))
        tokens, *logprobs = (
            None if column is None else column[: batch.num_sampled].numpy().copy()
            for column in compute(self._columns, self.shapes[-1])
        )
        assert tokens is not None
        return Done(StepResult(tokens, *logprobs))

    def preparation(self, compute: Compute) -> Callable[[], None] | None:
        return (lambda: self._run_ahead(compute, self._ahead.pop(0))) if self._ahead else None

    def _run_ahead(self, compute: Compute, shape: StepShape) -> None:
        self.shapes.append(shape)
        write_nobodys_batch(self._columns, is_decode=shape.max_prompts == 0)
        assert compute(self._columns, shape).tokens.shape == (shape.num_sampled,)


def padding(runner: ModelRunner) -> ModelRunner:
    runner.device = PaddingDevice(0)
    return runner


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_every_shape_that_is_captured_ahead_can_be_run_and_leaves_the_cache_alone(tmp_path: Path, family: str) -> None:
    """P5: those of a server's own limits."""
    runner = padding(load_runner(make_tiny_model(tmp_path, family), dtype="float32"))
    sizes = pad_sizes(256, 2048)
    generator = Generator(runner, max_num_seqs=256, pad_sizes=sizes)
    cache: Tensor = runner._cache.fill_(7.0)
    before = cache.clone()
    count = 0
    while (work := generator.runner.preparation()) is not None:
        work()
        count += 1
    assert count > 150
    assert torch.equal(cache, before)
    steps: Any = runner._steps
    assert any(shape.num_seqs > shape.num_tokens for shape in steps.shapes)


def test_padded_steps_give_the_tokens_of_plain_ones(tmp_path: Path) -> None:
    """Once with many short prompts: 20 sequences are padded to 64, their tokens to 48."""
    folder = make_tiny_model(tmp_path, "qwen3")
    sampled: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 7, "max_tokens": 40}
    plain = Generator(load_runner(folder, dtype="float32"), max_num_seqs=64)
    padded = Generator(padding(load_runner(folder, dtype="float32")), max_num_seqs=64, pad_sizes=pad_sizes(64, 2048))
    for lengths in ([3, 40, 7, 90, 12, 200, 5], [2] * 20):
        prompts = prompts_of(lengths)
        for params in ({"max_tokens": 40}, sampled, {**sampled, "num_logprobs": 3}, {**sampled, "n": 3}):
            assert padded.generate(prompts, **params) == plain.generate(prompts, **params)
    steps: Any = padded.runner._steps
    assert any(shape.num_seqs > shape.num_tokens for shape in steps.shapes)
