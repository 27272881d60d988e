"""A STEP message to outputs. Knows the columns; not sockets, not streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..wire import FinishReason, StepHeader
from . import ChoiceOutput, TokenLogprobs

_FINISH = tuple(FinishReason)  # an index is several times as fast as a call of the enum


def outputs_of_step(header: StepHeader, columns: Sequence[bytes]) -> Iterator[tuple[int, ChoiceOutput]]:
    """(choice id, its output) in the order of the rows; ``choice`` is left 0 for whoever knows the request.

    Raises ValueError if the columns are not what the header says, before anything is given.
    """
    rows, width = header.rows, header.logprob_width
    sizes = [8, 4, 1, 4, 4, 8] + ([4 * width, 4 * width, 4] if width else [])
    if [len(column) for column in columns] != [rows * size for size in sizes]:
        raise ValueError(f"step {header.step}: {rows} rows of width {width} in {[len(c) for c in columns]} bytes")
    return _rows(columns, width, header.now)


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
