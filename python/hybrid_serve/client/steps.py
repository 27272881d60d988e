"""A STEP message to outputs and events. Knows the columns; not sockets, not streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..wire import FinishReason, StepEvent, StepHeader, WaitedFor
from . import ChoiceEvent, ChoiceOutput, TokenLogprobs

_FINISH = tuple(FinishReason)  # an index is several times as fast as a call of the enum
_EVENTS = {int(kind): kind.name.lower() for kind in StepEvent}
_REASONS = tuple(reason.name.lower() for reason in WaitedFor)


def outputs_of_step(header: StepHeader, columns: Sequence[bytes]) -> Iterator[tuple[int, ChoiceOutput]]:
    """(choice id, its output) in the order of the rows; ``choice`` is left 0 for whoever knows the request.

    Raises ValueError if the columns are not what the header says, before anything is given.
    """
    rows, width = header.rows, header.logprob_width
    sizes = [rows * size for size in [8, 4, 1, 4, 4, 8] + ([4 * width, 4 * width, 4] if width else [])]
    sizes += [header.events * size for size in (8, 4, 1)] if header.events else []
    if [len(column) for column in columns] != sizes:
        raise ValueError(f"step {header.step}: {rows} rows of width {width} in {[len(c) for c in columns]} bytes")
    return _rows(columns, width, header.now)


def events_of_step(header: StepHeader, columns: Sequence[bytes], now: float) -> Iterator[tuple[int, ChoiceEvent]]:
    """(choice id, event), as ``outputs_of_step``; to be asked after it. ``now``: this process's clock, in seconds."""
    if not header.events:
        return
    at = now - (header.now - header.scheduled) * 1e-6
    ids, values, kinds = columns[-3:]
    for id, value, kind in zip(memoryview(ids).cast("Q"), memoryview(values).cast("i"), kinds, strict=True):
        what, reason = _EVENTS.get(kind & 0xF, "unknown"), _REASONS[min(kind >> 4, len(_REASONS) - 1)]
        yield id, ChoiceEvent(0, at, what, value, reason, header.num_tokens, header.num_seqs)


def event_in_step(header: StepHeader, choice: int, at: float, what: str) -> ChoiceEvent:
    return ChoiceEvent(choice, at, what, num_tokens=header.num_tokens, num_seqs=header.num_seqs)


def _rows(columns: Sequence[bytes], width: int, now: int) -> Iterator[tuple[int, ChoiceOutput]]:
    ids = memoryview(columns[0]).cast("Q").tolist()
    tokens = memoryview(columns[1]).cast("i").tolist()
    cached = memoryview(columns[3]).cast("i").tolist()
    preemptions = memoryview(columns[4]).cast("i").tolist()
    scheduled = memoryview(columns[5]).cast("q").tolist()
    rows = zip(ids, tokens, columns[2], cached, preemptions, scheduled, strict=True)
    for row, (id, token, finish, hit, preempted, at) in enumerate(rows):
        output = ChoiceOutput(0, [token], _FINISH[finish], hit, num_preemptions=preempted)
        if at >= 0:
            output.prefill_seconds = (now - at) * 1e-6
        if width:
            output.logprobs = _logprobs(columns[6:], row, width)
        yield id, output


def _logprobs(columns: Sequence[bytes], row: int, width: int) -> list[TokenLogprobs]:
    start, end = row * width, (row + 1) * width
    ids = memoryview(columns[1]).cast("i")[start:end].tolist()
    if ids[0] < 0:
        return []  # another row of the step asked
    values = list[float](memoryview(columns[0]).cast("f")[start:end])
    rank = memoryview(columns[2]).cast("i")[row]
    top: list[tuple[int, float]] = [(id, value) for id, value in zip(ids[1:], values[1:], strict=True) if id >= 0]
    return [TokenLogprobs(values[0], rank, top)]
