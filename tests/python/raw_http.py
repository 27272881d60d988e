"""The application on a real socket, and requests as bytes: for clients that no HTTP library would be."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from api_harness import CHAT, MESSAGES, Api
from hybrid_serve.server.process import http_server
from hybrid_serve.server.tls import Certificate

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter
Connect: TypeAlias = Callable[..., Awaitable[tuple[Reader, Writer]]]
GOOD = json.dumps({"messages": MESSAGES}).encode()


def request(body: bytes = GOOD, *headers: bytes, path: str = CHAT) -> bytes:
    lines = [f"POST {path} HTTP/1.1".encode(), b"Host: localhost", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


@asynccontextmanager
async def served(api: Api, certificate: Certificate | None = None, send_buffer: int = 0) -> AsyncIterator[Connect]:
    """The application on a real socket; gives a function that connects. With a certificate it speaks TLS, and the
    function takes the client's context."""
    listener = socket.socket(proto=socket.IPPROTO_TCP)  # else asyncio leaves its connections' Nagle algorithm on
    if send_buffer:  # what the system takes before the server notices that nobody reads
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    server = http_server(api.context, certificate)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    writers: list[Writer] = []

    async def connect(tls: ssl.SSLContext | None = None) -> tuple[Reader, Writer]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        writers.append(writer)
        return reader, writer

    try:
        yield connect
    finally:
        for writer in writers:
            writer.close()
        server.should_exit = True
        await serving


async def response_of(reader: Reader) -> tuple[int, dict[str, str], Any]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
    body = await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), 5)
    return int(head[0].split()[1]), headers, json.loads(body)


async def exchange(connect: Any, *pieces: bytes) -> tuple[int, dict[str, str], Any]:
    reader, writer = await connect()
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0)
    return await response_of(reader)


def error_code(answer: tuple[int, dict[str, str], Any]) -> tuple[int, str]:
    return answer[0], answer[2]["error"]["code"]
