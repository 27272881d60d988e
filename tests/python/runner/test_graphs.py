"""Which steps are recorded, and when (B20, P5): the policy, with a recorder that only notes what it is asked for."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hybrid_serve.runner.graphs import Graphs, Replay
from hybrid_serve.runner.pad_sizes import PadSizes, pad_sizes
from hybrid_serve.runner.step import Columns, Compute, Sampled, StepShape, likely_shapes, padded_shape

LAYOUT = {"kv_blocks": (0, "<i4", 900), "adjustments": (0, "<i4", 210)}
NOTHING = Sampled(torch.empty(0))


class Recorder:
    """Notes every step, by how it was run."""

    def __init__(self, likely: list[StepShape] | None = None) -> None:
        self.log: list[tuple[str, StepShape]] = []
        self.graphs = Graphs(self.record, likely or [])

    def record(self, compute: Compute, columns: Columns, shape: StepShape) -> tuple[Replay, Sampled]:
        self.log.append(("record", shape))
        return lambda: self.log.append(("replay", shape)), NOTHING

    def compute(self, columns: Columns, shape: StepShape) -> Sampled:
        self.log.append(("run", shape))
        return NOTHING

    def step(self, shape: StepShape) -> list[str]:
        self.log.clear()
        self.graphs.run(self.compute, {}, shape)
        return [how for how, _ in self.log]

    def ahead(self) -> list[str]:
        shape = self.graphs.next_ahead()
        self.log.clear()
        if shape is not None:
            self.graphs.record_ahead(self.compute, {}, shape)
        return [how for how, _ in self.log]


SMALL, LARGE, OTHER = likely_shapes(PadSizes(decodes=(1, 8, 16)), LAYOUT)


def test_a_shape_is_run_then_recorded_then_replayed() -> None:
    recorder = Recorder()
    assert [recorder.step(SMALL) for _ in range(3)] == [["run"], ["record", "replay"], ["replay"]]
    copying = SMALL._replace(num_copies=2)
    assert [recorder.step(copying) for _ in range(3)] == [["run"]] * 3
    assert recorder.graphs.next_ahead() is None


def test_ahead_what_came_in_service_is_recorded_first_then_the_likely_in_their_order() -> None:
    """P5."""
    recorder = Recorder([SMALL, LARGE])
    recorder.step(OTHER)
    assert recorder.ahead() == ["run", "record"]
    assert recorder.step(OTHER) == ["replay"]
    assert recorder.graphs.next_ahead() == SMALL
    recorder.step(SMALL)
    recorder.step(SMALL)
    assert recorder.graphs.next_ahead() == LARGE
    assert recorder.ahead() == ["run", "record"]
    assert recorder.graphs.next_ahead() is None
    assert recorder.step(LARGE) == ["replay"]


def test_likely_shapes_are_those_that_padded_batches_have() -> None:
    sizes = pad_sizes(256, 8192)
    likely = likely_shapes(sizes, LAYOUT)
    assert len(set(likely)) == len(likely) <= sizes.num_shapes
    assert likely[:3] == likely_shapes(PadSizes(decodes=(1, 2, 4)), LAYOUT)
    dice = random.Random(3)
    arrays = {name: np.full(count, -1, np.int32) for name, (_, _, count) in LAYOUT.items()}
    views: Any = SimpleNamespace(arrays=arrays | {"num_logprobs": np.full(256, -1, np.int32)})
    for _ in range(300):
        seqs = dice.randint(1, 256)
        decodes = dice.choice([seqs, dice.randint(0, seqs - 1)])
        tokens = seqs if decodes == seqs else dice.randint(seqs, 2048)
        seq_sizes = sizes.decodes if decodes == seqs else sizes.mixed_seqs
        padded_seqs = min(size for size in seq_sizes if size >= seqs)
        padded = padded_seqs if decodes == seqs else min(size for size in sizes.mixed_tokens if size >= tokens)
        batch: Any = SimpleNamespace(
            num_seqs=seqs,
            num_decodes=decodes,
            num_sampled=decodes,
            padded_tokens=padded,
            padded_seqs=padded_seqs,
            num_copies=0,
            num_prefixes=0,
        )
        assert padded_shape(batch, views) in likely
