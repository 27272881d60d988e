"""Flight recordings: what an engine's scheduler was told and decided, read from the engine's memory and kept as lines.

A file is JSON lines: a header with the names of every event's words, one array an event, and a last line with the
digest of the decisions. It has no token and no text: see cpp/core/recorder.h, whose words these are.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from . import __version__

SCHEMA = "hybrid-serve/flight"
VERSION = 2
NUM_STEPS = 1000  # that a recording has at least, if there is room
NUM_BYTES = 64 * 2**20  # of memory; pages that nobody writes cost nothing
KEPT_FILES = 8  # in one folder

# By the number of an event in cpp/core/recorder.h: its name, and those of its words. "..." goes on to the end.
EVENTS = {
    1: ("state", "..."),
    2: ("add", "id client n priority prompt generated length_limit min_tokens adjustments traits"),
    3: ("abort", "ids..."),
    4: ("forget", ""),
    5: ("schedule", "now_us"),
    6: ("commit", "step picked..."),
    7: ("limit", "max_running"),
    8: ("hash", "id block hash"),
    9: ("admit", "id found blocks..."),
    10: ("preempt", "id"),
    11: ("step", "step num_seqs (id tokens num_blocks blocks)... decodes sampled (source copy)..."),
}
DECISIONS = {"commit", "admit", "preempt", "step"}
_NUMBER_OF = {name: number for number, (name, _) in EVENTS.items()}
_MAGIC, _HEADER_WORDS, _CONFIG = 0x3130544847494C46, 64, 8
_CONFIG_NAMES = (
    "num_blocks",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "vocab_size",
    "num_clients",
    "depth",
    "enable_prefix_caching",
    "max_adjustments",
    "num_host_blocks",
    "swap_cost",
    "min_shared_tokens",
)
_ATTEMPTS = 200  # at a moment when the scheduler of a running engine is not at work


class BadRecording(Exception):
    """Not a file that ``write`` made, or a part of one."""


class Recording(NamedTuple):
    config: bytes  # words, i64
    events: bytes  # words, i64; oldest first, from a state on
    about: dict[str, Any]  # what the header says besides


def read_memory(memory: memoryview) -> Recording | None:
    """Of an engine that runs, hangs or is dead; None: it recorded nothing."""
    words = memory.cast("q")
    for attempt in range(_ATTEMPTS):
        mark, calls, turns, half_words, *rest = words[:8].tolist()
        if mark != _MAGIC or turns == 0:
            return None
        is_at_work = calls % 2 == 1  # a scheduler that stays at work hangs or has died there
        if (is_at_work or words[1] != calls) and attempt < _ATTEMPTS - 1:
            time.sleep(0.0005)
            continue
        ends, joined = rest[:2], rest[2:4]
        last = (turns - 1) % 2
        halves = [1 - last, last] if joined[last] else [last]
        starts = [_HEADER_WORDS + half * half_words for half in (0, 1)]
        events = b"".join(bytes(words[starts[half] : starts[half] + ends[half]]) for half in halves)
        if words[2] == turns:  # no half was begun anew meanwhile
            return Recording(bytes(words[_CONFIG : _CONFIG + len(_CONFIG_NAMES)]), events, {})
    return None


def split(events: bytes) -> Iterator[tuple[str, Sequence[int]]]:
    """Name and words of each event. Raises BadRecording."""
    words = memoryview(events).cast("q")
    at = 0
    while at < len(words):
        number, size = words[at] & 0xFF, words[at] >> 8
        if number not in EVENTS or not 0 <= size < len(words) - at:
            raise BadRecording(f"word {at} is no event")
        yield EVENTS[number][0], words[at + 1 : at + 1 + size]
        at += 1 + size


def decisions_of(events: bytes) -> list[tuple[str, Sequence[int]]]:
    return [(name, words) for name, words in split(events) if name in DECISIONS]


def digest(decisions: Sequence[tuple[str, Sequence[int]]]) -> str:
    """SHA-256 over the decisions, as lines of the file."""
    found = hashlib.sha256()
    for name, words in decisions:
        found.update(_line(name, words))
    return found.hexdigest()


def write(path: Path, recording: Recording, **about: Any) -> None:
    """A file of this user's alone. Raises OSError."""
    header = {
        "schema": SCHEMA,
        "version": VERSION,
        "hybrid_serve": __version__,
        **about,
        "config": dict(zip(_CONFIG_NAMES, memoryview(recording.config).cast("q").tolist(), strict=True)),
        "events": {name: names.split() for name, names in EVENTS.values()},
    }
    events = list(split(recording.events))
    decisions = [event for event in events if event[0] in DECISIONS]
    trailer = {"num_events": len(events), "num_decisions": len(decisions), "sha256": digest(decisions)}
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(header) + b"\n")
        file.writelines(_line(name, words) for name, words in events)
        file.write(msgspec.json.encode(trailer) + b"\n")


def read(path: Path) -> Recording:
    """What ``write`` wrote; ``about`` has its header and its last line. Raises BadRecording and OSError."""
    with open(path, "rb") as file:
        first = file.readline(2**20)
        header = _object(first)
        if header.get("schema") != SCHEMA:
            raise BadRecording("its first line is not the header of a flight recording")
        if header.get("version") != VERSION:
            raise BadRecording(f"it is of version {header.get('version')}, this program reads version {VERSION}")
        lines = file.read().splitlines()
    trailer = _object(lines[-1] if lines else b"")
    if trailer.get("num_events") != len(lines) - 1:
        raise BadRecording(f"it has {max(0, len(lines) - 1)} events and {trailer.get('num_events', 'no')} at its end")
    events = array("q")
    try:
        numbers = array("q", [header["config"][name] for name in _CONFIG_NAMES])
        for line in lines[:-1]:
            name, *words = msgspec.json.decode(line)
            events.append(_NUMBER_OF[name] | len(words) << 8)
            events.extend(words)
    except (ValueError, TypeError, KeyError, OverflowError) as error:  # DecodeError is a ValueError
        raise BadRecording(f"its config or one of its events is malformed: {error!r}"[:200]) from None
    return Recording(numbers.tobytes(), events.tobytes(), {**header, **trailer})


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _line(name: str, words: Sequence[int]) -> bytes:
    return msgspec.json.encode([name, *words]) + b"\n"


def new_path(folder: Path, engine: int, now: float) -> Path:
    """For a file in ``folder``, of which the newest ones are kept."""
    for old in sorted(folder.glob("hybrid-serve-flight-*.jsonl"))[: -KEPT_FILES + 1]:
        if old.stat().st_uid == os.getuid():
            old.unlink(missing_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now * 1e6) % 10**6:06d}Z"
    return folder / f"hybrid-serve-flight-{stamp}-{os.getpid()}-engine-{engine}.jsonl"
