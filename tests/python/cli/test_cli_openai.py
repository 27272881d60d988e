"""``chat`` and ``complete`` against a real HTTP server on this machine (S3)."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hybrid_serve.cli.api_client import ApiClient
from hybrid_serve.cli.main import main

DEADLINE = 20.0


class FakeOpenAI(ThreadingHTTPServer):
    """Answers chat and completions with ``pieces`` as server-sent events, then ``ending``; keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pieces: list[str] = ["Hel", "lo"]
        self.ending: bytes = b"data: [DONE]\n\n"
        self.status = 200
        self.refusal: bytes = b""
        self.models: Any = {"object": "list", "data": [{"id": "tiny"}, {"id": "second"}]}
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.go_on = threading.Semaphore(0)  # with ``waits``: one permit a piece
        self.waits = False
        self.client_left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: FakeOpenAI
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        assert self.path == "/v1/models"
        self.answer(self.server.status, self.server.refusal or json.dumps(self.server.models).encode())

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.refusal:
            self.answer(self.server.status, self.server.refusal)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in self.events():
                self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.client_left.set()

    def events(self) -> Iterator[bytes]:
        is_chat = self.path == "/v1/chat/completions"
        assert is_chat or self.path == "/v1/completions"
        yield b": keep-alive\n\n"
        if is_chat:
            yield self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for piece in self.server.pieces:
            if self.server.waits:
                self.server.go_on.acquire()
            choice = {"delta": {"content": piece}} if is_chat else {"text": piece}
            yield self.event({"choices": [{"index": 0, **choice, "finish_reason": None}]})
        yield self.event({"choices": [], "usage": {"completion_tokens": len(self.server.pieces)}})
        yield self.server.ending

    def event(self, data: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(data).encode() + b"\n\n"

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    fake = FakeOpenAI()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.shutdown()
    thread.join()
    fake.server_close()


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRID_SERVE_API_KEY", raising=False)


def refused(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": None}}).encode()


def test_a_quick_chat_prints_the_reply(server: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-q", "hi", "--url", server.url, "--system-prompt", "be brief", "--max-tokens", "7"]) == 0
    assert capsys.readouterr().out == "Hello\n"
    (request,) = server.requests
    assert request["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert (request["model"], request["max_tokens"], request["stream"]) == ("tiny", 7, True)
    assert "temperature" not in request
    assert server.keys == [None, None]


def test_a_quick_completion_prints_the_continuation(server: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["complete", "-q", "Once", "--url", server.url + "/", "--max-tokens", "3", "--temperature", "0"]
    assert main([*argv, "--model-name", "mine"]) == 0
    assert capsys.readouterr().out == "Hello\n"
    (request,) = server.requests
    assert (request["model"], request["prompt"], request["max_tokens"], request["temperature"]) == (
        "mine",
        "Once",
        3,
        0.0,
    )


def test_stats_print_the_two_times(server: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    """S3: `--stats` prints `TTFT:` and `TPS:`."""
    server.pieces = ["a", "b", "c"]
    assert main(["chat", "-q", "hi", "--url", server.url, "--stats"]) == 0
    text, ttft, tps = capsys.readouterr().out.splitlines()
    assert text == "abc"
    assert 0 < float(ttft.removeprefix("TTFT: ").removesuffix(" ms")) < 1e4
    assert float(tps.removeprefix("TPS: ").removesuffix(" tok/s")) > 0


def test_an_empty_reply_has_no_rate(server: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    server.pieces = []
    assert main(["chat", "-q", "hi", "--url", server.url, "--stats"]) == 0
    assert "TTFT: none" in capsys.readouterr().out


def test_the_key_comes_from_the_flag_or_the_environment(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_SERVE_API_KEY", "k1,k2")
    assert main(["chat", "-q", "hi", "--url", server.url]) == 0
    assert main(["chat", "-q", "hi", "--url", server.url, "--api-key", "k3"]) == 0
    assert server.keys == ["Bearer k1"] * 2 + ["Bearer k3"] * 2


def test_a_talk_remembers_until_it_is_cleared(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two \n/clear\nthree\n/quit\nnever\n"))
    assert main(["chat", "--url", server.url]) == 0
    said = [[message["content"] for message in request["messages"]] for request in server.requests]
    assert said == [["one"], ["one", "Hello", "two"], ["three"]]
    assert capsys.readouterr().out == "Hello\n" * 3


def test_a_refused_prompt_does_not_end_the_talk_or_stay_in_it(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prompts() -> str:
        server.refusal = refused("too long") if len(server.requests) == 1 else b""
        return ["one\n", "far too long\n", "two\n", ""][len(server.requests)]

    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "readline", prompts)
    monkeypatch.setattr("sys.stdin", stdin)
    server.status = 400  # of a refusal
    assert main(["chat", "--url", server.url, "--model-name", "tiny"]) == 0
    assert [len(request["messages"]) for request in server.requests] == [1, 3, 3]
    assert server.requests[2]["messages"][2]["content"] == "two"
    assert "answered 400: too long" in capsys.readouterr().err


def test_a_server_that_is_down_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """S3: exit 1, no traceback."""
    with socket.socket() as bound:  # bound but not listening: nobody else gets the port, and connecting is refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        for command in ("chat", "complete"):
            assert main([command, "-q", "hi", "--url", url]) == 1
            assert capsys.readouterr().err == (
                f"hybrid-serve {command}: no server at {url} (start one: hybrid-serve serve)\n"
            )


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, refused("wrong key"), "answered 401: wrong key"),
        (404, b"<html>nothing\nhere</html>", "answered 404: Not Found"),
        (500, b'{"detail": [1]}', 'answered 500: {"detail": [1]}'),
        (503, b'{"error": "busy"}', 'answered 503: {"error": "busy"}'),
        (200, b"{}", "lists no model, name one with --model-name"),
        (200, b"[]", "lists no model, name one with --model-name"),
        (200, b"hello", "lists no model, name one with --model-name"),
    ],
)
def test_whatever_the_server_answers_instead_is_one_line(
    server: FakeOpenAI, capsys: pytest.CaptureFixture[str], status: int, body: bytes, message: str
) -> None:
    server.status, server.refusal = status, body
    assert main(["chat", "-q", "hi", "--url", server.url]) == 1
    shown = capsys.readouterr()
    assert shown.err == f"hybrid-serve chat: {server.url} {message}\n"
    assert shown.out == ""


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (b'data: {"error": {"message": "engine died"}}\n\n', "the server broke off: engine died"),
        (b": nothing more\n\n", "the server closed the connection in the middle of the reply"),
        (b"data: not json\n\n", "the server broke off: something that is not JSON"),
    ],
)
def test_a_reply_that_breaks_off_is_shown_and_is_a_failure(
    server: FakeOpenAI, capsys: pytest.CaptureFixture[str], ending: bytes, message: str
) -> None:
    server.ending = ending
    assert main(["chat", "-q", "hi", "--url", server.url]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("Hello")
    assert shown.err.splitlines()[-1] == f"hybrid-serve chat: {message}"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x/v1", "http:///v1", "http://h:port/v1", "http://h:99999/v1"])
def test_a_url_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert main(["chat", "-q", "hi", "--url", url]) == 2
    assert f"--url {url}" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", " ", "k\r\nX: y", "ké"])
def test_a_key_that_cannot_be_sent_is_a_usage_error(capsys: pytest.CaptureFixture[str], key: str) -> None:
    """ADV-07, and no header injection."""
    assert main(["chat", "-q", "hi", "--api-key", key]) == 2
    shown = capsys.readouterr().err
    assert "X: y" not in shown
    assert "ké" not in shown


def test_pieces_are_shown_as_they_come(server: FakeOpenAI) -> None:
    server.waits = True
    with talk(server, "-q", "hi") as process:
        assert process.stdout
        for piece in server.pieces:
            server.go_on.release()
            # Blocks until the piece is there; the line break after the last one may come along with it.
            assert os.read(process.stdout.fileno(), 100).rstrip() == piece.encode()
        assert process.wait(DEADLINE) == 0


def test_an_interrupt_stops_the_reply_and_the_talk_goes_on(server: FakeOpenAI) -> None:
    server.waits, server.pieces = True, ["abc"] * 1000
    with talk(server) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"one\n")
        process.stdin.flush()
        server.go_on.release()
        assert os.read(process.stdout.fileno(), 100) == b"abc"
        process.send_signal(signal.SIGINT)
        server.go_on.release(999)  # an interrupt just ahead of a blocking read shows when something comes
        assert os.read(process.stdout.fileno(), 100) == b"\n"
        assert server.client_left.wait(DEADLINE)  # the connection was closed: our server ends the request
        server.pieces = []
        process.stdin.write(b"two\n")
        process.stdin.flush()
        wait_until(lambda: len(server.requests) == 2)
        assert [message["content"] for message in server.requests[1]["messages"]] == ["one", "abc", "two"]
        assert os.read(process.stdout.fileno(), 100) == b"\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130


def test_an_interrupted_quick_reply_is_exit_130_without_traceback(server: FakeOpenAI) -> None:
    server.waits = True
    with talk(server, "-q", "hi") as process:
        assert process.stdout
        assert process.stderr
        server.go_on.release()
        assert os.read(process.stdout.fileno(), 100) == b"Hel"
        process.send_signal(signal.SIGINT)
        server.go_on.release(10)
        assert process.wait(DEADLINE) == 130
        assert b"Traceback" not in process.stderr.read()


def test_a_client_sends_no_header_that_it_was_not_given() -> None:
    assert "Authorization" not in ApiClient("http://localhost/v1")._headers


def talk(server: FakeOpenAI, *argv: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hybrid_serve", "chat", "--url", server.url, *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
