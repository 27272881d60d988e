"""An event loop whose time passes only while everybody waits, and then at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

from hybrid_serve import session
from hybrid_serve.client import group
from hybrid_serve.engine import inbox, loop, outbox

from .network import SimSocket


class Hang(Exception):
    """Everybody waits, and nobody for a time."""


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0  # some time after the machine's start

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Hang("everybody waits for somebody")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """One thread, no wall clock, no real file descriptor: the same callbacks in the same order in every run."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self._clock_resolution = 1e-7  # a sum of times may be that much short of a timer's

    def time(self) -> float:
        return self._virtual.now

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        if isinstance(fd, SimSocket):
            fd.on_readable = lambda: self.call_soon(callback, *args)
        else:
            super().add_reader(fd, callback, *args)

    def remove_reader(self, fd: Any) -> bool:
        if isinstance(fd, SimSocket):
            fd.on_readable = None
            return True
        return super().remove_reader(fd)


class VirtualClock:
    """The module ``time`` as far as the product asks it."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.monotonic = loop.time

    def monotonic_ns(self) -> int:
        return round(self.monotonic() * 1e9)

    perf_counter_ns = time_ns = monotonic_ns

    def rules(self) -> AbstractContextManager[Any]:
        """Within, the product's parts that run here have no other clock."""
        stack = ExitStack()
        for module in (loop, inbox, outbox, session):
            stack.enter_context(patch.object(module, "time", self))
        stack.enter_context(patch.object(group, "monotonic", self.monotonic))
        return stack
