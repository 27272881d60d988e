"""The way back to one client: a JSON answer or a stream of events, and the watch on whether anyone still listens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

from starlette.types import Receive, Scope, Send

from .entrance import Seat
from .errors import ApiError, as_api_error
from .headers import RANK_HEADER, TIMEOUT_HEADER, header_values
from .keys import Key
from .lifecycle import Lifecycle

DONE = b"data: [DONE]\n\n"
_PING = b": keep-alive\n\n"
_JSON_HEADERS = [(b"content-type", b"application/json")]
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class ClientDisconnected(Exception):
    """Nobody listens any more; nothing is sent and nothing is wrong."""


class Exchange:
    """One request's answer; knows when to stop working, not what the work is.

    ``run(work)`` ends the work (by cancelling it, so that ``async with client.generate`` aborts) as soon as the client
    is gone or the server must stop. The watch is one task and one timer a request, never one a token.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, lifecycle: Lifecycle, keep_alive_interval: float = 0.0
    ) -> None:
        state = scope.get("state", {})
        self.request_id: str = state.get("request_id", "")
        self.trace_headers = {
            name.decode(): value.decode("latin-1")
            for name, value in scope.get("headers", ())
            if name in (b"traceparent", b"tracestate")
        }
        self.rank = header_values(scope, RANK_HEADER.encode()) if "headers" in scope else []
        self.timeout = header_values(scope, TIMEOUT_HEADER.encode()) if "headers" in scope else []
        self.key: Key | None = state.get("key")
        self.key_name = self.key.name if self.key is not None else None
        self.seat = Seat()
        self._ignored: list[str] = []
        self.timing: Callable[[], str | None] = lambda: (
            None
        )  # the Server-Timing header, asked for when an answer starts
        self.arrived = monotonic()
        self._receive, self._send, self._lifecycle = receive, send, lifecycle
        self._interval = keep_alive_interval or None
        self._wants_stream = False
        self._started = False
        self._last_write = 0.0

    async def run(self, work: Awaitable[None]) -> None:
        """Raises what the work raised if no byte was sent; on a stream it becomes an error event without ``[DONE]``."""
        self._lifecycle.opened()
        worker = asyncio.ensure_future(work)
        try:
            await self._watch(worker)
        except ClientDisconnected:
            raise
        except Exception as error:
            if not self._started:
                raise
            await self._stop(worker)
            await self._fail(as_api_error(error))
        finally:
            await self._stop(worker)
            self._lifecycle.closed()

    async def _watch(self, worker: asyncio.Future[None]) -> None:
        cut = self._lifecycle.cut
        receiver = asyncio.ensure_future(self._receive())
        try:
            while True:
                watched: set[asyncio.Future[Any]] = {worker, receiver, cut}
                done, _ = await asyncio.wait(watched, timeout=self._interval, return_when=asyncio.FIRST_COMPLETED)
                if worker in done:
                    return worker.result()
                if cut in done:
                    raise ApiError("draining", "The server is shutting down; the request was not finished.")
                if receiver in done:
                    if receiver.result()["type"] == "http.disconnect":
                        raise ClientDisconnected
                    receiver = asyncio.ensure_future(self._receive())
                if not done:
                    await self._keep_alive()
        finally:
            receiver.cancel()

    async def _stop(self, worker: asyncio.Future[None]) -> None:
        worker.cancel()
        await asyncio.wait({worker})
        if not worker.cancelled():
            worker.exception()  # seen: it was raised above, or came while the work was being ended

    def name_ignored(self, names: list[str]) -> None:
        """Fields of the request that had no effect; they are named in a response header."""
        self._ignored += names

    def begin_stream(self) -> None:
        """From now on silence is filled by comments, even before the first event."""
        self._wants_stream = True

    async def write(self, events: bytes) -> None:
        """Sends events at once; the response starts with the first."""
        if not self._started:
            await self._start(200, _STREAM_HEADERS)
        self._last_write = monotonic()
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_stream(self, events: bytes = b"") -> None:
        if not self._started:
            await self._start(200, _STREAM_HEADERS)
        await self._send({"type": "http.response.body", "body": events, "more_body": False})

    async def answer(self, body: bytes, status: int = 200) -> None:
        """The whole response as JSON."""
        await self._start(status, [*_JSON_HEADERS, (b"content-length", b"%d" % len(body))])
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        if timing := self.timing():
            headers = [*headers, (b"server-timing", timing.encode())]
        if self._ignored:
            headers = [*headers, (b"x-hybrid-ignored", ",".join(self._ignored).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _keep_alive(self) -> None:
        assert self._interval is not None
        if self._wants_stream and monotonic() - self._last_write >= self._interval * 0.9:
            await self.write(_PING)

    async def _fail(self, error: ApiError) -> None:
        await self.end_stream(b"data: " + error.body(self.request_id) + b"\n\n")
