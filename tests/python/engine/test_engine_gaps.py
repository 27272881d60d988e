"""What passes between two steps, by the test's own clock (PERFORMANCE: the device must not wait for the host)."""

from __future__ import annotations

from hybrid_serve.engine.gaps import Gaps
from hybrid_serve.wire import STEP_GAP_BOUNDS


class Clock:
    def __init__(self) -> None:
        self.us = 0

    def __call__(self) -> int:
        return self.us * 1000


def counts(gaps: Gaps) -> dict[float, int]:
    """By the bound of the bucket."""
    return {bound: count for bound, count in zip([*STEP_GAP_BOUNDS, float("inf")], gaps.counts, strict=True) if count}


def test_a_gap_lasts_from_a_steps_results_to_the_next_step() -> None:
    clock = Clock()
    gaps = Gaps(clock)
    gaps.begun()  # before it there was no work
    assert counts(gaps) == {}
    for pause in (15, 70, 70_000):
        clock.us += 1_000_000  # the step's own time is no gap
        gaps.over()
        clock.us += pause
        gaps.begun()
    assert counts(gaps) == {20: 1, 100: 1, float("inf"): 1}
    assert round(gaps.total_us) == 70_085


def test_time_without_work_is_no_gap() -> None:
    clock = Clock()
    gaps = Gaps(clock)
    gaps.begun()
    gaps.over()
    gaps.rested()
    clock.us += 5_000
    gaps.begun()
    assert counts(gaps) == {}


def test_a_step_behind_another_one_that_is_under_way_has_no_gap() -> None:
    clock = Clock()
    gaps = Gaps(clock)
    gaps.begun()
    gaps.begun()
    clock.us += 300
    gaps.over()
    clock.us += 300
    gaps.begun()
    assert counts(gaps) == {0: 2}
    gaps.over()
    gaps.over()
    clock.us += 40
    gaps.begun()
    assert counts(gaps) == {0: 2, 50: 1}
