"""ZmqStream: the outputs of one request while they arrive, and what it takes to ask for the rest of them again."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterator

import msgspec

from ..wire import AddRequest
from . import ChoiceEvent, ChoiceOutput

MOST_EVENTS = 500  # of one stream


class ZmqStream:
    """Which choices of a request still run, what came of them in all and since the last turn. Knows no socket.

    One task iterates. ``begin`` is called on entering the ``async with`` block, ``abort`` with the ids that nobody
    wants any more: of one choice, or on leaving the block of all that still run.
    """

    __slots__ = (
        "_abort",
        "_begin",
        "_error",
        "_live",
        "_outputs",
        "_prompt",
        "_received",
        "_request",
        "_waiter",
        "engine",
        "events",
        "num_resets",
    )

    def __init__(
        self,
        request: AddRequest,
        prompt: bytes,
        begin: Callable[[ZmqStream], None],
        abort: Callable[[ZmqStream, list[int]], None],
    ) -> None:
        """``prompt``: i32."""
        self._request, self._prompt = request, prompt
        self._begin, self._abort = begin, abort
        self.engine = -1  # which one has it; -1: the block was not entered yet
        self._live = set(range(request.n))  # choices
        self._received = [array("i") for _ in range(request.n)]
        self._outputs: list[ChoiceOutput] = []
        self.events: list[ChoiceEvent] = []
        self.num_resets = 0  # of its session with the engine, since something came
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
    def first_id(self) -> int:
        return self._request.id

    @property
    def live_ids(self) -> list[int]:
        return [self.first_id + choice for choice in sorted(self._live)]

    def first_message(self) -> tuple[AddRequest, bytes]:
        """The request, and its token ids."""
        return self._request, self._prompt

    def replay(self, suspects: set[int]) -> Iterator[tuple[AddRequest, bytes]]:
        """What an engine that knows nothing of the request must be told for the rest of it: one request, or one a
        choice if some of them have begun, each with the tokens it has received."""
        ids = set(self.live_ids)
        if len(ids) == self._request.n and not any(self._received):
            is_suspect = not suspects.isdisjoint(ids)
            yield msgspec.structs.replace(self._request, is_replay=True, is_suspect=is_suspect), self._prompt
            return
        for choice in sorted(self._live):
            received = self._received[choice]
            id = self.first_id + choice
            request = msgspec.structs.replace(
                self._request,
                id=id,
                n=1,
                num_generated=len(received),
                first_choice=choice,
                is_replay=True,
                is_suspect=id in suspects,
            )
            yield request, self._prompt + received.tobytes()

    def happened(self, event: ChoiceEvent) -> None:
        if len(self.events) < MOST_EVENTS:
            self.events.append(event)

    def put(self, output: ChoiceOutput) -> None:
        """Wakes nobody: a step may bring several outputs."""
        received = self._received[output.choice]
        if received:
            output.cached_tokens, output.prefill_seconds = -1, -1.0  # said before; a replay is prefilled once more
        received.extend(output.token_ids)
        self.num_resets = 0
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
