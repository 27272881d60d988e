"""Outbox: one message per API server and step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..wire import EngineStats, Kind, StepEvent, StepHeader, pack
from .admissions import Admissions
from .executor import StepResult
from .gaps import Gaps
from .peers import Peers
from .phases import Phases
from .probation import Probation

if TYPE_CHECKING:
    from .._core import Outputs, Scheduler

STATS_INTERVAL = 0.25  # seconds; also how soon an API server that went away is noticed while others' requests run


class Around(NamedTuple):
    """What statistics say of the engine's door."""

    may_run: int  # requests at once
    num_dropped: int  # messages
    num_refused: int  # connections


class Outbox:
    """Cuts the columns of a step by API server and sends them; knows no request, makes no object per token."""

    def __init__(
        self,
        peers: Peers,
        probation: Probation,
        gaps: Gaps,
        phases: Phases,
        around: Callable[[], Around],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers, self._probation, self._gaps, self._phases = peers, probation, gaps, phases
        self._around, self._clock = around, clock
        self._admissions, self._num_admitted = Admissions(), 0  # those since the last statistics
        self._next_stats = 0.0
        self._said: tuple[int, ...] | None = None  # what has changed, if it has, since an idle engine spoke

    def send(self, outputs: Outputs, result: StepResult) -> None:
        """Everything in ``outputs`` and ``result`` is read before this returns."""
        if len(outputs.event_kinds):
            kinds = np.frombuffer(outputs.event_kinds, np.uint8) & 15
            self._num_admitted += int(np.count_nonzero(kinds == StepEvent.ADMITTED))
        starts, events, now = outputs.client_start.tolist(), outputs.event_start.tolist(), time.monotonic_ns() // 1000
        if self._probation.is_busy:
            self._probation.stepped(outputs.ids)
        for client, live in enumerate(self._peers.live):
            start, end = starts[client], starts[client + 1]
            first, last = events[client], events[client + 1]
            if start == end and first == last:
                continue
            header, columns = step_columns(outputs, result, start, end, now, (first, last))
            self._peers.send(client, pack(Kind.STEP, header, *columns))
            ended = bytes(columns[2])
            if ended.count(0) != len(ended):
                ids = columns[0]
                finished = [ids[row] for row, reason in enumerate(ended) if reason]
                live.difference_update(finished)
                self._probation.ended(finished)

    def send_stats(self, core: Scheduler, idle: bool) -> None:
        """At most four times a second; on becoming idle at once, and then for every JOIN and CHECK."""
        now = self._clock()
        if not idle and now < self._next_stats:
            return
        stats = core.stats()
        around = self._around()
        to_hear = (self._peers.num_joins, self._peers.num_checks)
        state = (stats.steps, *to_hear, around.num_dropped, around.num_refused)
        if idle and state == self._said:
            return
        self._said = state if idle else None
        self._next_stats = now + STATS_INTERVAL
        is_full = stats.num_waiting > 0 or stats.num_running >= around.may_run
        self._admissions.saw(now, self._num_admitted, is_full)
        self._num_admitted = 0
        message = EngineStats(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_blocks_used=stats.blocks_used,
            kv_blocks_total=stats.blocks_total,
            num_preemptions=stats.num_preemptions,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            steps=stats.steps,
            step_tokens=stats.step_tokens,
            step_token_counts=tuple(stats.step_token_counts),
            step_gap_us=round(self._gaps.total_us),
            step_gap_counts=tuple(self._gaps.counts),
            num_swapped=stats.num_swapped,
            host_blocks_used=stats.host_blocks_used,
            host_blocks_total=stats.host_blocks_total,
            blocks_swapped_out=stats.blocks_swapped_out,
            blocks_swapped_in=stats.blocks_swapped_in,
            num_dropped=around.num_dropped,
            num_refused=around.num_refused,
            may_run=around.may_run,
            admission_seconds=self._admissions.seconds_each,
            waiting_seconds=max(0.0, now - stats.waiting_since * 1e-6) if stats.num_waiting else 0.0,
            empty_slots=stats.empty_slots,
            step_age=self._phases.step_age,
            phase_us=tuple(ns // 1000 for ns in self._phases.totals),
        )
        self._peers.send_to_all(pack(Kind.STATS, message))


def step_columns(
    outputs: Outputs, result: StepResult, start: int, end: int, now: int = 0, events: tuple[int, int] = (0, 0)
) -> tuple[StepHeader, list[Any]]:
    """Rows [start, end) as a STEP message has them, without a copy where none is needed, and as many of the events.
    ``now``: see StepHeader."""
    columns: list[Any] = [
        outputs.ids[start:end],
        outputs.tokens[start:end],
        outputs.finish[start:end],
        outputs.cached_tokens[start:end],
        outputs.num_preemptions[start:end],
        outputs.scheduled_at[start:end],
    ]
    width = 0
    if result.logprobs is not None:
        width, extra = _logprobs(result, np.asarray(outputs.rows[start:end]))
        columns += extra
    first, last = events
    if first < last:
        columns += [outputs.event_ids[first:last], outputs.event_values[first:last], outputs.event_kinds[first:last]]
    header = StepHeader(
        outputs.step,
        end - start,
        width,
        now,
        last - first,
        outputs.scheduled,
        outputs.num_tokens,
        outputs.num_seqs,
    )
    return header, columns


def _logprobs(result: StepResult, rows: NDArray[np.int32]) -> tuple[int, list[NDArray[Any]]]:
    """(width, columns) of these sampled rows; nothing if none of them asked."""
    if result.logprobs is None or result.logprob_ids is None or result.ranks is None:
        return 0, []
    ids = result.logprob_ids[rows]
    asked = int((ids >= 0).sum(axis=1).max(initial=0))  # another client's row may have asked for more
    if asked == 0:
        return 0, []
    columns = [result.logprobs[rows, :asked], ids[:, :asked], result.ranks[rows]]
    return asked, [np.ascontiguousarray(column) for column in columns]
