"""Hostile and unlucky connections on a real socket (F-24, F-25, F-26, F-27, ADV-30, ADV-39)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from api_harness import CHAT, MESSAGES, Api
from hybrid_serve.server.connection import BoundedProtocol
from hybrid_serve.server.process import Stopping, http_server
from raw_http import GOOD, error_code, exchange, request, response_of, served

MakeApi = Callable[..., Api]


def test_requests_share_a_connection(api: Api) -> None:
    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            for _ in range(3):
                writer.write(request())
                assert (await response_of(reader))[0] == 200
            writer.write(request() + request())  # pipelined
            for _ in range(2):
                assert (await response_of(reader))[0] == 200

    api.run(scenario())


@pytest.mark.parametrize(
    "flood",
    [
        [request(GOOD, b"X-Big: " + b"a" * 40_000)],
        [request(GOOD, *[b"X-%d: a" % i for i in range(101)])],
        [b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Endless: ", *[b"a" * 4096] * 12],
        [b"GET / HTTP/1.1\r\nHost: localhost\r\n", *[b"X-%d: %s\r\n" % (i, b"b" * 900) for i in range(60)]],
    ],
)
def test_flood_of_headers_is_refused_and_the_connection_ends(api: Api, flood: list[bytes]) -> None:
    """F-24, ADV-30"""

    async def scenario() -> None:
        async with served(api) as connect:
            answer = await exchange(connect, *flood)
            assert error_code(answer) == (431, "headers_too_large")
            assert answer[1]["connection"] == "close"
            assert (await exchange(connect, request()))[0] == 200

    api.run(scenario())


def test_bounds_of_headers_are_what_is_configured(make_api: MakeApi) -> None:
    """S23"""
    api = make_api(max_header_bytes=50_000, max_headers=300)

    async def scenario() -> None:
        async with served(api) as connect:
            for headers, status in (
                ([b"X-Big: " + b"a" * 40_000], 200),
                ([b"X-Big: " + b"a" * 50_000], 431),
                ([b"X-%d: a" % i for i in range(296)], 200),
                ([b"X-%d: a" % i for i in range(300)], 431),
            ):
                answer = await exchange(connect, request(GOOD, *headers))
                assert answer[0] == status
            assert "50000 bytes or 300 headers" in answer[2]["error"]["message"]

    api.run(scenario())


def test_an_idle_connection_is_closed_when_its_time_is_over(make_api: MakeApi) -> None:
    """S23: and not before the next request, if that comes in time."""
    api = make_api(keep_alive_timeout=1)

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            for _ in range(2):
                writer.write(request())
                assert (await response_of(reader))[0] == 200
                began = time.monotonic()
            assert await asyncio.wait_for(reader.read(), 20) == b""
            assert time.monotonic() - began > 0.9

    api.run(scenario())


def test_a_body_of_33_mib_is_too_large_for_a_server_with_defaults(api: Api) -> None:
    """S23: the refusal is read although the body is still being sent, and the connection can be used again."""
    body = b'{"prompt": "' + b"x" * 33 * 2**20 + b'"}'

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            writer.write(request(body))
            assert error_code(await response_of(reader)) == (413, "request_too_large")
            writer.write(request())
            assert (await response_of(reader))[0] == 200

    api.run(scenario())


def test_what_is_not_http_gets_the_usual_error_body(api: Api) -> None:
    async def scenario() -> None:
        async with served(api) as connect:
            for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
                assert error_code(await exchange(connect, garbage)) == (400, "invalid_http")
            bad_chunks = (
                b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" % CHAT.encode()
            )
            reader, writer = await connect()
            writer.write(bad_chunks)
            assert (await response_of(reader))[0] in (400, 415)

    api.run(scenario())


def test_slow_headers_are_timed_out_while_others_are_served(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-25"""
    monkeypatch.setattr(BoundedProtocol, "header_seconds", 0.2)

    async def scenario() -> None:
        async with served(api) as connect:
            slow = [asyncio.ensure_future(exchange(connect, b"POST /v1/chat/comp")) for _ in range(20)]
            assert (await exchange(connect, request()))[0] == 200
            for answer in await asyncio.gather(*slow):
                assert error_code(answer) == (408, "request_timeout")
            # An idle connection between requests has another limit: it is not cut by this one.
            reader, writer = await connect()
            writer.write(request())
            assert (await response_of(reader))[0] == 200
            await asyncio.sleep(0.3)
            writer.write(request())
            assert (await response_of(reader))[0] == 200

    api.run(scenario())


def test_slow_body_is_timed_out(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-26"""
    monkeypatch.setattr(BoundedProtocol, "body_seconds", 0.1)

    async def scenario() -> None:
        async with served(api) as connect:
            answer = await exchange(connect, request()[:-5])
            assert error_code(answer) == (408, "request_timeout")
            assert api.context.lifecycle.num_open == 0

    api.run(scenario())


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body_is_answered_and_not_kept(make_api: MakeApi, chunked: bool) -> None:
    """F-27, ADV-39: the client reads the 413 although it is still sending, and may go on with the connection."""
    api = make_api(max_request_bytes=2000)
    body = b'{"unused": "' + b"x" * 3_000_000 + b'"}'
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    if chunked:
        pieces = [
            b"%x\r\n%s\r\n" % (len(part), part) for part in (body[i : i + 9973] for i in range(0, len(body), 9973))
        ]
        message = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(pieces) + b"0\r\n\r\n"
    else:
        message = head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            writer.write(message)
            assert error_code(await response_of(reader)) == (413, "request_too_large")
            await writer.drain()
            writer.write(request(b'{"prompt": "x"}', path="/tokenize"))
            assert (await response_of(reader))[0] == 200

    api.run(scenario())


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(api: Api) -> None:
    """ADV-26"""

    async def scenario() -> None:
        async with served(api) as connect:
            for _ in range(50):
                _, writer = await connect()
                writer.write(request()[:-3])
                await writer.drain()
                writer.close()
            assert (await exchange(connect, request()))[0] == 200
            assert api.context.lifecycle.num_open == 0

    api.run(scenario())


def test_one_connection_too_many_is_told_so_and_the_others_go_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-41"""
    monkeypatch.setattr(BoundedProtocol, "max_connections", 3)

    async def scenario() -> None:
        async with served(api) as connect:
            idle = [await connect() for _ in range(3)]
            for _ in range(2):
                answer = await exchange(connect)
                assert error_code(answer) == (503, "too_many_connections")
                assert (answer[1]["retry-after"], answer[1]["connection"]) == ("1", "close")
            flood = [await connect() for _ in range(100)]
            for reader, _ in flood:
                with contextlib.suppress(ConnectionResetError):
                    await asyncio.wait_for(reader.read(), 5)
            for reader, writer in idle:
                writer.write(request())
                assert (await response_of(reader))[0] == 200
                writer.close()
                await writer.wait_closed()
            assert (await exchange(connect, request()))[0] == 200

    api.run(scenario())


def test_a_process_with_few_files_serves_whom_it_can(tmp_path: Path) -> None:
    """F-42: 300 clients, 160 files; afterwards everything is as before, and meanwhile the processor rests."""
    code = """
import asyncio, resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
import uvloop
from api_harness import Api
from hybrid_serve.server.connection import BoundedProtocol
from hybrid_serve.server.process import http_server, raise_file_limit
BoundedProtocol.max_connections = raise_file_limit()
api = Api()
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(2048)
print(listener.getsockname()[1], BoundedProtocol.max_connections, flush=True)
uvloop.run(http_server(api.context).serve(sockets=[listener]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as server:
        try:
            assert server.stdout is not None
            port, most = map(int, server.stdout.readline().split())
            assert most == 64
            get = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
            clients = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(300)]
            clients[0].sendall(get)
            assert clients[0].recv(12) == b"HTTP/1.1 200"
            used = psutil.Process(server.pid).cpu_times()
            time.sleep(0.5)
            spent = psutil.Process(server.pid).cpu_times()
            assert spent.user + spent.system - used.user - used.system < 0.3
            for client in clients:
                client.close()
            end = time.monotonic() + 10
            answer = b""
            while answer != b"HTTP/1.1 200":
                assert time.monotonic() < end
                with socket.create_connection(("127.0.0.1", port), 10) as client, contextlib.suppress(ConnectionError):
                    client.sendall(get)
                    answer = client.recv(12)
        finally:
            server.kill()


def test_shutdown_keeps_the_socket_open_until_the_last_request_has_ended(make_api: MakeApi) -> None:
    """F-12: exit only then; who comes meanwhile is told, not refused."""
    from fake_engine import FakeEngine

    engine = FakeEngine(lambda call, choice: [5] * 4)
    engine.gates[2] = asyncio.Event()
    api = make_api(engine)

    async def scenario() -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        server = http_server(api.context)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(json.dumps({"messages": MESSAGES, "stream": True}).encode()))
        await reader.readuntil(b"content")
        Stopping(api.context, server).begin(now=False)
        late_reader, late_writer = await asyncio.open_connection("127.0.0.1", port)
        late_writer.write(request())
        assert error_code(await response_of(late_reader)) == (503, "draining")
        assert not serving.done()
        engine.gates[2].set()
        assert b"[DONE]" in await asyncio.wait_for(reader.read(), 5)
        await asyncio.wait_for(serving, 5)
        late_writer.close()
        writer.close()

    api.run(scenario())
