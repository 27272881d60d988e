"""``replay FILE``: a flight recording's schedule once more, on the scheduler of this program, without model or GPU."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from .. import flight
from .usage import Parser, UsageError, dashed

DIFFERS = 1


def replay(argv: list[str]) -> int:
    """0: every decision is the same again; 1: one is not, which is printed. Raises UsageError for another file."""
    parser = Parser(
        "hybrid-serve replay",
        "Gives a flight recording's inputs to the scheduler of this program and compares every decision with the\n"
        "recorded one: which requests ran, how many tokens of each, in which blocks.",
    )
    parser.add_argument("FILE", nargs="?", help="hybrid-serve-flight-*.jsonl, as the server's log names it")
    file = parser.parse_args(dashed(argv)).FILE
    if file is None:
        raise UsageError("a FILE is needed, as the server's log names it")
    path = Path(file)
    try:
        recording = flight.read(path)
        recorded = flight.decisions_of(recording.events)
    except flight.BadRecording as error:
        raise UsageError(f"{path} cannot be replayed: {error}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    about = recording.about
    print(f"{path.name}: hybrid-serve {about.get('hybrid_serve')}, {about.get('time')}, {about.get('why')}")
    if flight.digest(recorded) != about["sha256"]:
        raise UsageError(f"{path} was changed: its decisions have another digest than its last line says")
    decided, failure = _decide(path, recording)
    num_steps = sum(name == "step" for name, _ in recorded)
    difference = _first_difference(recorded, decided)
    if difference:
        print(difference)
    if failure:
        print(f"the scheduler ended the replay: {failure}")
    if difference:
        return DIFFERS
    print(f"{num_steps} steps, {len(recorded)} decisions, sha256 {flight.digest(decided)}: the same again")
    return 0


def _decide(path: Path, recording: flight.Recording) -> tuple[list[tuple[str, Sequence[int]]], str]:
    from .. import _core

    try:
        words, failure = _core.replay(recording.config, recording.events)
    except (ValueError, MemoryError) as error:
        raise UsageError(f"{path} cannot be replayed: {error}") from None
    return list(flight.split(words)), failure


def _first_difference(
    recorded: Sequence[tuple[str, Sequence[int]]], decided: Sequence[tuple[str, Sequence[int]]]
) -> str:
    """Two decisions as lines of the file, with the step that they belong to; empty if all are the same."""
    step = "the first step"
    for number, (was, now) in enumerate(itertools.zip_longest(recorded, decided), 1):
        if was is None or now is None or was[0] != now[0] or was[1] != now[1]:
            return f"decision {number}, after {step}, differs:\n  recorded {_shown(was)}\n  now      {_shown(now)}"
        if was[0] == "step":
            step = f"step {was[1][0]}"
    return ""


def _shown(decision: tuple[str, Sequence[int]] | None) -> str:
    return "nothing more" if decision is None else json.dumps([decision[0], *decision[1]])
