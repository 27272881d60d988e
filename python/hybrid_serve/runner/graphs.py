"""Graphs: which steps are recorded, and when; knows shapes, not what a step computes nor how it is recorded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from .step import Columns, Compute, Sampled, StepShape

Replay = Callable[[], None]
# Records what ``compute`` launches: gives what launches it again, and where the results then are.
Record = Callable[[Compute, Columns, StepShape], tuple[Replay, Sampled]]


class Graphs:
    """A shape's first step runs kernel by kernel, the second one is recorded, those after it are replayed: nobody waits
    for shapes that never come back, and the first run lets the kernels take the scratch they need. While there is
    nothing to do, shapes are recorded ahead: those that came once, then the likely ones."""

    def __init__(self, record: Record, likely: Iterable[StepShape] = ()) -> None:
        """``likely``: most likely first."""
        self._record = record
        self._seen: dict[StepShape, None] = {}  # not recorded yet, in the order of their first step
        self._likely = deque(likely)
        self._recorded: dict[StepShape, tuple[Replay, Sampled]] = {}

    def run(self, compute: Compute, columns: Columns, shape: StepShape) -> Sampled:
        """On the current stream, which must not be the default one."""
        found = self._recorded.get(shape)
        if found is None:
            if shape.num_copies > 0:  # rare, and of any number
                return compute(columns, shape)
            if shape not in self._seen:
                self._seen[shape] = None
                return compute(columns, shape)
            found = self._add(compute, columns, shape)
        replay, sampled = found
        replay()
        return sampled

    def next_ahead(self) -> StepShape | None:
        """What to record while there is nothing to do; None: nothing is left."""
        if self._seen:
            return next(iter(self._seen))
        while self._likely and self._likely[0] in self._recorded:
            self._likely.popleft()
        return self._likely[0] if self._likely else None

    def record_ahead(self, compute: Compute, columns: Columns, shape: StepShape) -> None:
        """``columns``: of a batch that is nobody's, valid for any shape."""
        compute(columns, shape)  # the kernels take their scratch, which they cannot while they are recorded
        self._add(compute, columns, shape)

    def _add(self, compute: Compute, columns: Columns, shape: StepShape) -> tuple[Replay, Sampled]:
        found = self._recorded[shape] = self._record(compute, columns, shape)
        self._seen.pop(shape, None)
        return found
