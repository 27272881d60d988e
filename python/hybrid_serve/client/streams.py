"""ZmqStream: the outputs of one request while they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from . import ChoiceOutput


class ZmqStream:
    """Which choices of a request still run, and what came of them since the last turn. Knows no socket and no frame.

    One task iterates. ``begin`` is called on entering the ``async with`` block, ``abort`` with the ids that nobody
    wants any more: of one choice, or on leaving the block of all that still run.
    """

    __slots__ = ("_abort", "_begin", "_error", "_live", "_outputs", "_waiter", "first_id", "n")

    def __init__(
        self, first_id: int, n: int, begin: Callable[[ZmqStream], None], abort: Callable[[ZmqStream, list[int]], None]
    ) -> None:
        self.first_id, self.n = first_id, n
        self._begin, self._abort = begin, abort
        self._live = set(range(n))  # choices
        self._outputs: list[ChoiceOutput] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> ZmqStream:
        self._begin(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._live:
            ids = self.live_ids
            self._live.clear()
            self._abort(self, ids)

    def __aiter__(self) -> ZmqStream:
        return self

    async def __anext__(self) -> list[ChoiceOutput]:
        while not self._outputs:
            if self._error is not None:
                raise self._error
            if not self._live:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        outputs, self._outputs = self._outputs, []
        return outputs

    def abort(self, choice: int) -> None:
        """Ends one choice, whose outputs that were not read yet are dropped. One that has finished stays as it is."""
        if choice in self._live:
            self._live.discard(choice)
            self._outputs = [output for output in self._outputs if output.choice != choice]
            self._abort(self, [self.first_id + choice])
            self.wake()

    # What follows is the client's side.

    @property
    def live_ids(self) -> list[int]:
        return [self.first_id + choice for choice in sorted(self._live)]

    def put(self, output: ChoiceOutput) -> None:
        """Wakes nobody: a step may bring several outputs."""
        self._outputs.append(output)
        if output.finish:
            self._live.discard(output.choice)

    def fail(self, error: Exception) -> None:
        """What has arrived is still read, then ``error`` is raised."""
        self._error = error
        self._live.clear()
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
