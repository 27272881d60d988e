"""Bounds on one connection that the HTTP parser does not have: size, number and pace of headers, pace of a body in
either direction."""

from __future__ import annotations

import asyncio
import functools
from typing import Any, NamedTuple, cast

from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .door import Door
from .errors import ApiError, ErrorResponse

SPARE_CONNECTIONS = 32  # beyond the limit, for those that are being told so
HEADER_SECONDS = 10.0
BODY_SECONDS = 30.0
LEAST_BODY_BYTES = 1024  # a second, over BODY_SECONDS
WRITE_SECONDS = 60.0  # that a client may leave what it was sent unread
LINGER_SECONDS, LINGER_BYTES = 1.0, 2**20  # what is still read, unseen, after a refusal
MAX_DISCARDED_BYTES = 64 * 2**20  # of a body that was refused; then the connection ends


class HeaderBounds(NamedTuple):
    """Of one request's line and headers."""

    num_bytes: int
    num_headers: int


_turned_away: set[BoundedProtocol] = set()  # of the process, as its files are


class _Answered:
    """In the place of uvicorn's state of a request, when there is nothing left to be done for it."""

    response_started = response_complete = True
    disconnected = False
    message_event = asyncio.Event()


_ANSWERED = cast(RequestResponseCycle, _Answered())


def _as_bytes(response: ErrorResponse, is_last: bool) -> bytes:
    """``is_last``: on its connection."""
    lines = [b"%s: %s\r\n" % header for header in response.headers]
    if is_last:
        lines.append(b"connection: close\r\n")
    return b"".join((STATUS_LINE[response.status], *lines, b"\r\n", response.body))


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, bounded; knows no route. A refusal has the usual error body and ends the connection."""

    max_connections = 2**31  # the process lowers it to what the system gives it
    header_seconds, body_seconds, write_seconds = HEADER_SECONDS, BODY_SECONDS, WRITE_SECONDS  # tests make them short

    def __init__(self, *of_uvicorn: Any, header_bounds: HeaderBounds, door: Door) -> None:
        super().__init__(*of_uvicorn)
        self._bounds, self._door = header_bounds, door

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refused = False
        self._unread: asyncio.TimerHandle | None = None
        self._begin_headers()
        if len(self.connections) > self.max_connections:
            self._turn_away()

    def _turn_away(self) -> None:
        self.connections.discard(self)
        if len(_turned_away) >= SPARE_CONNECTIONS:  # no time for good manners
            self.transport.abort()
            return
        _turned_away.add(self)
        text = f"{self.max_connections} connections are open, as many as this server may have."
        self._refuse(ApiError("too_many_connections", text))

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._stop_unread()
        _turned_away.discard(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        # The stream waits for the client; without an end to that, whoever reads nothing holds its place for ever.
        self._unread = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_unread()
        super().resume_writing()

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _begin_headers(self) -> None:
        self._in_headers, self._in_body = True, False
        self._num_bytes = self._discarded = 0
        self._timer = self.loop.call_later(self.header_seconds, self._headers_are_late)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._refused:
            if self._num_bytes > LINGER_BYTES:
                self.transport.abort()
            return
        super().data_received(data)
        # The parser keeps an unfinished header to itself, however long: hence the bytes are counted here.
        if self._in_headers and self._num_bytes > self._bounds.num_bytes:
            self._too_large()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_headers:  # a further request on this connection
            self._timer.cancel()
            self._begin_headers()
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_header(len(name) + len(value) + 4)

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self._bounds.num_bytes or len(self.headers) > self._bounds.num_headers:
            self._too_large()

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        self._in_headers, self._in_body = False, True
        self._num_bytes = 0
        self._timer.cancel()
        self._timer = self.loop.call_later(self.body_seconds, self._check_body)
        if not self._is_turned_away():
            super().on_headers_complete()

    def _is_turned_away(self) -> bool:
        """Whether the request has its answer already. Its body, which has mostly come with it, is read and dropped."""
        is_behind_another = self.cycle is not None and not self.cycle.response_complete
        if is_behind_another or self.expect_100_continue or self.transport.is_closing():
            return False
        if self.parser.get_method() != b"POST":
            return False
        self.scope["method"] = "POST"
        response = self._door.refusal(self.url, cast(Scope, self.scope))
        if response is None:
            return False
        self._is_last = self.parser.get_http_version() == "1.0" or not self.parser.should_keep_alive()
        self.transport.write(_as_bytes(response, self._is_last))
        self.cycle = _ANSWERED
        self.on_response_complete()
        return True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        begin = functools.partial(super()._start_asgi_task, cycle)
        self._door.let_in(cast(Scope, cycle.scope), app, lambda: not cycle.more_body, begin)

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > MAX_DISCARDED_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._in_body = False
        self._timer.cancel()
        super().on_message_complete()
        if self.cycle is _ANSWERED and self._is_last:
            self.transport.close()

    def _headers_are_late(self) -> None:
        self._refuse(ApiError("request_timeout", f"The headers took more than {self.header_seconds:g} seconds."))

    def _check_body(self) -> None:
        if self._num_bytes < LEAST_BODY_BYTES * self.body_seconds:
            self._refuse(ApiError("request_timeout", "The body came too slowly."))
            return
        self._num_bytes = 0
        self._timer = self.loop.call_later(self.body_seconds, self._check_body)

    def _too_large(self) -> None:
        bounds = f"{self._bounds.num_bytes} bytes or {self._bounds.num_headers} headers"
        self._refuse(ApiError("headers_too_large", f"The request's headers are more than {bounds}."))

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError("invalid_http", "This is not a valid HTTP request."))

    def _refuse(self, error: ApiError) -> None:
        """Answers if nothing of another answer is on its way, and ends the connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._timer.cancel()
        is_answered = self.cycle is not None and self.cycle.response_complete and self._in_body
        if not is_answered and (self.cycle is None or self.cycle.response_complete or not self.cycle.response_started):
            if self.cycle is not None:
                self.cycle.disconnected = True  # what its route still sends goes nowhere
                self.cycle.message_event.set()
            self.transport.write(_as_bytes(error.response(None), is_last=True))
        # Closing with unread input would reset the connection, and the answer might be lost with it.
        if self.transport.can_write_eof():  # not under TLS
            self.transport.write_eof()
        self._num_bytes = 0
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
