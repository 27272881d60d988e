"""Heartbeat: what an engine last did, in memory that its supervisor reads at any time, also after its death."""

from __future__ import annotations

import mmap
import os
import signal
import time
from array import array
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from . import flight
from .config import MAX_NUM_SEQS, Config
from .shared_memory import anonymous_file

PULSE_SECONDS = 0.25
STACKS_SIGNAL = signal.SIGUSR1  # asks an engine for its stacks
_BATCH_FIELDS = 8
_SLOTS = 16  # of 8 bytes, before the ids
_PHASE, _SINCE, _PULSE, _NUM_RUNNING, _NUM_ON_TRIAL, _BATCH = 0, 1, 2, 3, 4, 5


class EnginePhase(IntEnum):
    LOADING = 0
    IDLE = 1
    STEP = 2  # from a batch's start to the next look at the messages
    CAPTURE = 3  # nothing to do: what later steps will need is made ready, a piece at a time


class BatchHeader(NamedTuple):
    """The numbers of a batch: what to say of the one that an engine died with. No token, no text."""

    step: int
    num_seqs: int
    num_tokens: int
    num_decodes: int
    num_sampled: int
    max_query_len: int
    max_seq_len: int
    num_copies: int


class Heartbeat:
    """One record: phase, since when, the last sign of life, the last batch and the ids in it.

    Behind it the memory of a flight recording. Knows no request and no limit. One process writes, another reads: each
    number is written whole, the ids are read only when the writer is dead. Times are of the machine's monotonic clock,
    in nanoseconds.
    """

    def __init__(self, fd: int, max_ids: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """``fd``: see ``make``; closed by whoever opened it."""
        self._clock, self._max_ids = clock, max_ids
        memory, size = memoryview(mmap.mmap(fd, _num_bytes(max_ids) + flight.NUM_BYTES)), _num_bytes(max_ids)
        self._words = memory[:size].cast("q")
        self.recording = memory[size:]

    # The engine writes.

    def enter(self, phase: EnginePhase) -> None:
        self._words[_SINCE] = self._clock()
        self._words[_PHASE] = phase

    def enter_step(self, header: BatchHeader, ids: bytes) -> None:
        """``ids``: u64, of the requests that run."""
        self._words[_BATCH : _BATCH + _BATCH_FIELDS] = array("q", header)
        self._write_ids(_NUM_RUNNING, _SLOTS, ids)
        self.enter(EnginePhase.STEP)

    def try_out(self, ids: bytes) -> None:
        """These are on trial from now on: if the engine dies, they are to blame."""
        self._write_ids(_NUM_ON_TRIAL, _SLOTS + self._max_ids, ids)

    def pulse(self) -> None:
        self._words[_PULSE] = self._clock()

    def pulse_forever(self) -> None:
        """A thread's work: says that the process is scheduled and its interpreter not locked, also in a long step."""
        while True:
            self.pulse()
            time.sleep(PULSE_SECONDS)

    # The supervisor reads.

    @property
    def phase(self) -> EnginePhase:
        return EnginePhase(self._words[_PHASE])

    def age(self) -> float:
        """Seconds since the phase began, or began anew."""
        return (self._clock() - self._words[_SINCE]) * 1e-9

    def pulse_age(self) -> float:
        return (self._clock() - self._words[_PULSE]) * 1e-9

    @property
    def batch(self) -> BatchHeader:
        return BatchHeader(*self._words[_BATCH : _BATCH + _BATCH_FIELDS])

    @property
    def running(self) -> bytes:
        return self._read_ids(_NUM_RUNNING, _SLOTS)

    @property
    def culprits(self) -> bytes:
        """Those on trial, if they ran; u64, as ``running``."""
        running = set(memoryview(self.running).cast("Q"))
        on_trial = memoryview(self._read_ids(_NUM_ON_TRIAL, _SLOTS + self._max_ids)).cast("Q")
        return b"" if running.isdisjoint(on_trial) else on_trial.tobytes()

    def clear(self) -> None:
        """For the engine that comes next."""
        self._words[:] = memoryview(bytes(self._words.nbytes)).cast("q")
        self.recording[:8] = bytes(8)
        self.enter(EnginePhase.LOADING)
        self.pulse()

    def _write_ids(self, count: int, start: int, ids: bytes) -> None:
        values = memoryview(ids).cast("q")[: self._max_ids]
        self._words[count] = 0
        self._words[start : start + len(values)] = values
        self._words[count] = len(values)

    def _read_ids(self, count: int, start: int) -> bytes:
        return bytes(self._words[start : start + self._words[count]])


def max_watched_ids(config: Config) -> int:
    """All that run at once, in every batch in flight."""
    return 4 * (config.scheduler.max_num_seqs or MAX_NUM_SEQS)


def make(max_ids: int) -> int:
    """A file descriptor of memory for a Heartbeat of so many ids, that goes when the last process closes it."""
    fd = anonymous_file("hybrid-serve-heartbeat")
    os.ftruncate(fd, _num_bytes(max_ids) + flight.NUM_BYTES)
    return fd


def _num_bytes(max_ids: int) -> int:
    return 8 * (_SLOTS + 2 * max_ids)
