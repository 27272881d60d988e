"""The application on a real socket in a process of its own, over a fake engine: for clients that only a process's own
memory and processor can tell about."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

_CODE = """
import socket
import sys
import uvloop
sys.path[:] = {path!r}
from api_harness import Api, REPLY, says
from fake_engine import FakeEngine
from hybrid_serve.server.connection import BoundedProtocol
from hybrid_serve.server.process import http_server, raise_file_limit
for name, value in {limits!r}.items():
    setattr(BoundedProtocol, name, value)
BoundedProtocol.max_connections = raise_file_limit()
api = Api(FakeEngine(says({text!r})), **{options!r})
listener = socket.socket(proto=socket.IPPROTO_TCP)
if {send_buffer!r}:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {send_buffer!r})
listener.bind(("127.0.0.1", 0))
listener.listen(2048)
print(listener.getsockname()[1], flush=True)
uvloop.run(http_server(api.context).serve(sockets=[listener]))
"""


@dataclass
class ApiProcess:
    port: int
    process: psutil.Process

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def ask(self, message: bytes) -> bytes:
        """The answer to one request after which the server or we hang up."""
        with self.connect() as connection:
            connection.sendall(message)
            return answer_of(connection)

    def seconds_of_live(self) -> float:
        begin = time.perf_counter()
        answer = self.ask(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200"), answer
        return time.perf_counter() - begin

    @property
    def rss(self) -> int:
        return int(self.process.memory_info().rss)


def answer_of(connection: socket.socket) -> bytes:
    """Head and body of the next answer; what there was of it if the connection ends."""
    answer = b""
    try:
        while b"\r\n\r\n" not in answer:
            answer += (piece := connection.recv(65536))
            if not piece:
                return answer
        head, _, body = answer.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        while lengths and len(body) < int(lengths[0].split(b":")[1]) and (piece := connection.recv(65536)):
            body += piece
        return head + b"\r\n\r\n" + body
    except ConnectionResetError:
        return answer


@contextmanager
def api_process(text: str = "one two three", send_buffer: int = 0, **options: Any) -> Iterator[ApiProcess]:
    """``options``: those whose names BoundedProtocol has are its limits, the others the server's."""
    from hybrid_serve.server.connection import BoundedProtocol

    limits = {name: options.pop(name) for name in list(options) if hasattr(BoundedProtocol, name)}
    code = _CODE.format(path=sys.path, limits=limits, text=text, options=options, send_buffer=send_buffer)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ)) as process:
        try:
            assert process.stdout is not None
            yield ApiProcess(int(process.stdout.readline()), psutil.Process(process.pid))
        finally:
            process.kill()
