"""Bounds on one connection that the HTTP parser does not have: size, number and pace of headers, pace of a body in
either direction."""

from __future__ import annotations

import asyncio
import http
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError

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


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, bounded; knows no route. A refusal has the usual error body and ends the connection."""

    max_connections = 2**31  # the process lowers it to what the system gives it
    header_seconds, body_seconds, write_seconds = HEADER_SECONDS, BODY_SECONDS, WRITE_SECONDS  # tests make them short

    def __init__(self, *of_uvicorn: Any, header_bounds: HeaderBounds) -> None:
        super().__init__(*of_uvicorn)
        self._bounds = header_bounds

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
        self._in_headers = True
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
        self._in_headers = False
        self._num_bytes = 0
        self._timer.cancel()
        self._timer = self.loop.call_later(self.body_seconds, self._check_body)
        super().on_headers_complete()

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
        self._timer.cancel()
        super().on_message_complete()

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
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            if self.cycle is not None:
                self.cycle.disconnected = True  # what its route still sends goes nowhere
                self.cycle.message_event.set()
            body = error.body(None)
            head = (
                f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            )
            if error.retry_after is not None:
                head += f"retry-after: {error.retry_after}\r\n"
            tail = f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write((head + tail).encode() + body)
        # Closing with unread input would reset the connection, and the answer might be lost with it.
        if self.transport.can_write_eof():  # not under TLS
            self.transport.write_eof()
        self._num_bytes = 0
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
