"""HTTP/1.1 for the commands that have many requests under way at once: asyncio's sockets, httptools' parser.

Knows bytes and headers; no JSON, no API, no retry. (``api_client`` is for the commands with one request at a time.)
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httptools

from .. import __version__
from .usage import UsageError

_READ_BYTES = 65536
_IDLE_SECONDS = 5.0  # a connection that rested longer is not used again: the server may be closing it
CONNECT_SECONDS = 30.0


class HttpFailure(Exception):
    """No answer, or half of one: refused, reset, timed out, not HTTP. One line."""


class Answer:
    """One response as it arrives: status and headers are there, the body is read piece by piece."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}  # names in lower case
        self._reader, self._parser = reader, httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._has_head = self._is_complete = False
        self.may_be_followed = False  # the body has ended, and the connection can carry another request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The pieces of the body as they come. Raises HttpFailure if it ends early."""
        while True:
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                yield piece
            if self._is_complete:
                return
            await self._feed()

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self])

    async def head(self) -> None:
        while not self._has_head:
            await self._feed()

    async def _feed(self) -> None:
        try:
            data = await self._reader.read(_READ_BYTES)
            if data:
                self._parser.feed_data(data)
            elif self._has_head and not self.headers.keys() & {"content-length", "transfer-encoding"}:
                self._is_complete = True  # an old server, which ends a body by closing
            else:
                raise HttpFailure("the server closed the connection in the middle of the reply")
        except (OSError, httptools.HttpParserError) as error:
            raise HttpFailure(str(error) or type(error).__name__) from error

    # httptools calls these

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status, self._has_head = self._parser.get_status_code(), True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._is_complete, self.may_be_followed = True, self._parser.should_keep_alive()


class HttpClient:
    """Any number of requests at once to one base URL; each on a connection of its own, kept for the next one."""

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UsageError(f"{url}: must be like http://127.0.0.1:8000")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\nUser-Agent: hybrid-serve/{__version__}\r\n"
        if api_key:
            self._head += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Answer]:
        """The answer to one request, its head read. Leaving the block before the body's end closes the connection.
        Raises HttpFailure."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n"
        kind = "Content-Type: application/json\r\n" if body else ""
        reader, writer = await self._connection()
        answer = Answer(reader)
        try:
            try:
                writer.write(f"{head}{kind}\r\n".encode() + body)
                await writer.drain()
            except OSError as error:
                raise HttpFailure(str(error)) from error
            await answer.head()
            yield answer
        finally:
            if answer.may_be_followed:
                self._idle.append((time.monotonic(), reader, writer))
            else:
                writer.close()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            since, reader, writer = self._idle.pop()
            if time.monotonic() - since < _IDLE_SECONDS and not reader.at_eof():
                return reader, writer
            writer.close()
        try:
            opening = asyncio.open_connection(self._host, self._port, ssl=self._tls)
            return await asyncio.wait_for(opening, CONNECT_SECONDS)
        except (OSError, TimeoutError, asyncio.TimeoutError) as error:
            why = getattr(error, "strerror", None) or str(error) or "no answer"
            raise HttpFailure(f"cannot connect to {self._host} port {self._port}: {why}") from error

    def close(self) -> None:
        for _, _, writer in self._idle:
            writer.close()
        self._idle.clear()
