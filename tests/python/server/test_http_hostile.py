"""Clients that mean harm, or look like it, at every route: refused as docs/security.md says, in bounded memory, while
others are served (F-24 to F-27, ADV-30, ADV-37, ADV-39)."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from api_harness import CHAT, MESSAGES, Api, routes
from api_process import ApiProcess, answer_of, api_process

MIB = 2**20
LIMIT = 20_000  # of a body
with closing(Api()) as _api:
    ROUTES = routes(_api)
NO_BODY = ("/ping", "/v1/models/demo/load", "/v1/models/demo/unload")  # of the routes with such a method
WITH_BODY = [(method, path) for method, path in ROUTES if method in ("POST", "PATCH") and path not in NO_BODY]
SECONDS = {"header_seconds": 1.5, "body_seconds": 1.0}


@pytest.fixture(scope="module")
def server() -> Iterator[ApiProcess]:
    """One for all of them: what one leaves behind, the next one would meet."""
    options: dict[str, Any] = {"max_request_bytes": LIMIT, "api_key": ("k",), "admin_api_key": ("boss",), **SECONDS}
    with api_process(**options) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(server: ApiProcess) -> Iterator[None]:
    """Whatever a test does: the memory stays, and the next client is served."""
    server.seconds_of_live()
    before = server.rss
    yield
    assert server.seconds_of_live() < 5
    assert server.rss - before < 48 * MIB


def head(method: str, path: str, *headers: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", b"x-api-key: boss", *headers]
    return b"\r\n".join([*lines, b"", b""])


def status_and_code(answer: bytes) -> tuple[int, str]:
    first, _, body = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(body)["error"]["code"] if b'"error"' in body else ""


JSON = b"Content-Type: application/json"


def floods(method: str, path: str) -> dict[str, list[bytes]]:
    """Pieces that are sent again and again, the last one without end."""
    begin = head(method, path)[:-2]
    return {
        "an endless header": [begin + b"X-Endless: ", b"a" * 16384],
        "headers without end": [begin, b"".join(b"X-%d: a\r\n" % i for i in range(1000))],
        "an endless path": [f"{method} {path}".encode(), b"/a" * 8192],
        "an endless name of a header": [begin, b"X" * 16384],
    }


@pytest.mark.parametrize("kind", floods("", ""))
def test_headers_without_end_are_a_431_at_every_route(server: ApiProcess, kind: str) -> None:
    """F-24"""
    for method, path in ROUTES:
        first, endless = floods(method, path)[kind]
        with server.connect() as connection:
            connection.sendall(first)
            sent = send_until_closed(connection, endless, 64 * MIB)
            answer = answer_of(connection)
        assert sent < 16 * MIB, (path, sent)
        # The reset of a connection that still sends may take the answer with it.
        assert not answer or status_and_code(answer) == (431, "headers_too_large"), (path, answer[:300])


def send_until_closed(connection: socket.socket, piece: bytes, most: int) -> int:
    """How many bytes were taken until the other side would take no more, or had answered."""
    sent = 0
    try:
        while sent < most and not select.select([connection], [], [], 0)[0]:
            sent += connection.send(piece)
    except (ConnectionError, TimeoutError):
        pass
    return sent


@pytest.mark.parametrize("announced", [True, False], ids=["Content-Length", "chunked"])
def test_a_body_of_a_gigabyte_is_a_413_and_its_rest_is_not_read_for_ever(server: ApiProcess, announced: bool) -> None:
    """F-27: with and without its length."""
    length = b"Content-Length: %d" % 2**30 if announced else b"Transfer-Encoding: chunked"
    piece = b"x" * 65536 if announced else b"%x\r\n%s\r\n" % (65536, b"x" * 65536)
    for method, path in WITH_BODY:
        with server.connect() as connection:
            connection.sendall(head(method, path, JSON, length))
            send_until_closed(connection, piece, MIB)
            answer = answer_of(connection)
            assert status_and_code(answer) == (413, "request_too_large"), (path, answer[:300])
            taken = 0
            try:
                while taken < 2**30:
                    taken += connection.send(piece)
            except ConnectionError:
                pass
            assert taken < 128 * MIB, (path, taken)


def test_routes_that_take_no_body_do_not_read_one_for_ever_either(server: ApiProcess) -> None:
    for method, path in [each for each in ROUTES if each not in WITH_BODY] + [("POST", "/no/such/route")]:
        with server.connect() as connection:
            connection.sendall(head(method, path, b"Content-Length: %d" % 2**30))
            assert answer_of(connection)[9:12] in (b"200", b"404"), path
            taken = 0
            try:
                while taken < 2**30:
                    taken += connection.send(b"x" * 65536)
            except ConnectionError:
                pass
            assert taken < 128 * MIB, (path, taken)


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ([JSON, b"Content-Length: 2", b"Content-Encoding: gzip"], b"{}", (415, "unsupported_media_type")),
        ([JSON, b"Content-Length: 2", b"Content-Encoding: br, gzip"], b"{}", (415, "unsupported_media_type")),
        ([JSON, b"Transfer-Encoding: gzip, chunked"], b"2\r\n{}\r\n0\r\n\r\n", (415, "unsupported_media_type")),
        ([JSON, b"Content-Length: 999999999999999999999999"], b"{}", (400, "invalid_http")),
        ([JSON, b"Content-Length: -1"], b"{}", (400, "invalid_http")),
        ([JSON, b"Content-Length: 2x"], b"{}", (400, "invalid_http")),
        ([JSON, b"Content-Length: 2", b"Content-Length: 3"], b"{}", (400, "invalid_http")),
        ([JSON, b"Content-Length: 2", b"Transfer-Encoding: chunked"], b"{}", (400, "invalid_http")),
        ([JSON, b"Transfer-Encoding: chunked"], b"ffffffffffffffffff\r\n", (400, "invalid_http")),
        ([JSON, b"Transfer-Encoding: chunked"], b"-1\r\n{}\r\n", (400, "invalid_http")),
        ([JSON, b"Transfer-Encoding: chunked"], b"7fffffffffffffff\r\n" + b"x" * 30_000, (413, "request_too_large")),
        ([JSON, b"Content-Length: 20001"], b"", (413, "request_too_large")),
    ],
)  # fmt: skip
def test_bodies_that_lie_about_themselves_are_refused_at_every_route_that_reads_one(
    server: ApiProcess, headers: list[bytes], body: bytes, expected: tuple[int, str]
) -> None:
    """F-27, ADV-39"""
    for method, path in WITH_BODY:
        with server.connect() as connection:
            connection.sendall(head(method, path, *headers) + body)
            found = status_and_code(answer_of(connection))
        assert found == expected, path


def test_what_follows_a_body_is_another_request_or_the_end(server: ApiProcess) -> None:
    for method, path in WITH_BODY:
        with server.connect() as connection:
            connection.sendall(head(method, path, JSON, b"Content-Length: 1") + b"{}")
            assert status_and_code(answer_of(connection)) == (400, "invalid_http"), path
            assert connection.recv(1) == b"", path
        with server.connect() as connection:
            last = head("GET", "/live", b"Connection: close")
            connection.sendall(head(method, path, JSON, b"Content-Length: 1") + b"{" + last)
            first, second = drain(connection).split(b"HTTP/1.1 ")[1:]
            assert (first[:3], b"invalid_json" in first, second[:3]) == (b"400", True, b"200"), path


def test_a_million_chunks_of_one_byte_hold_up_nobody(server: ApiProcess) -> None:
    """ADV-39"""
    with server.connect() as connection:
        connection.sendall(head("POST", CHAT, JSON, b"Transfer-Encoding: chunked"))
        chunks, slowest = b"1\r\nx\r\n" * 10_000, 0.0
        for _ in range(100):
            try:
                connection.sendall(chunks)
            except ConnectionError:
                break
            slowest = max(slowest, server.seconds_of_live())
        assert status_and_code(answer_of(connection))[0] == 413
    assert slowest < 2


def test_hundreds_of_slow_clients_are_timed_out_while_others_are_served(server: ApiProcess) -> None:
    """F-25, F-26: a byte now and then, of the headers or of a body, at every route."""
    slow: list[tuple[socket.socket, bytes]] = []
    for number in range(300):
        method, path = ROUTES[number % len(ROUTES)] if number % 2 else WITH_BODY[number % len(WITH_BODY)]
        connection = server.connect()
        if number % 2:
            connection.sendall(head(method, path)[:-2])
            slow.append((connection, b"X"))
        else:
            connection.sendall(head(method, path, JSON, b"Content-Length: 9000"))
            slow.append((connection, b" "))
    begin, times, answers = time.monotonic(), [], 0
    while slow and time.monotonic() - begin < 30:
        for connection, byte in slow:
            try:
                connection.send(byte)
            except ConnectionError:
                continue
        times.append(server.seconds_of_live())
        ended = select.select([connection for connection, _ in slow], [], [], 0.05)[0]
        for connection in ended:
            answer = answer_of(connection)
            assert not answer or status_and_code(answer) == (408, "request_timeout"), answer
            answers += bool(answer)
            connection.close()
        slow = [each for each in slow if each[0] not in ended]
    assert not slow
    assert answers > 250
    assert sorted(times)[len(times) // 2] < 0.5


def test_a_client_that_reads_nothing_is_dropped_and_the_others_go_on() -> None:
    """Its stream waits meanwhile: what was made for it and not sent is bounded."""
    body = {"messages": MESSAGES, "stream": True, "n": 16, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    data = json.dumps(body).encode()
    message = head("POST", CHAT, JSON, b"Content-Length: %d" % len(data)) + data
    with api_process(" ".join(["word"] * 250), send_buffer=16384, write_seconds=1.5) as server:
        undisturbed = read_to_end(server, message)
        whole = len(undisturbed)
        assert whole > 4 * MIB, "more than the system's buffers take"
        before = server.rss
        deaf = []
        for _ in range(20):
            connection = server.connect(receive_buffer=4096)
            connection.sendall(message)
            deaf.append(connection)
        times = [server.seconds_of_live() for _ in range(20)]
        assert sorted(times)[10] < 1
        assert server.rss - before < 20 * whole / 4
        assert read_to_end(server, message).count(b"data: ") == undisturbed.count(b"data: ")
        end = time.monotonic() + 30
        while connections_of(server) > 0:
            assert time.monotonic() < end
            time.sleep(0.05)
        # What is still in the system's buffers can be read, and then it is over before the stream is.
        for connection in deaf:
            assert len(drain(connection)) < whole / 2


def connections_of(server: ApiProcess) -> int:
    return len([each for each in server.process.net_connections("tcp") if each.status == "ESTABLISHED"])


def read_to_end(server: ApiProcess, message: bytes) -> bytes:
    with server.connect() as connection:
        connection.sendall(message)
        found = b""
        while b"data: [DONE]" not in found[-64:]:
            piece = connection.recv(MIB)
            assert piece
            found += piece
        return found


def drain(connection: socket.socket) -> bytes:
    found = b""
    with connection:
        try:
            while piece := connection.recv(MIB):
                found += piece
        except ConnectionError:
            pass
    return found
