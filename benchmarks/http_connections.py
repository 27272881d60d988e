"""Many clients of one API server: idle connections beside streams, then streams alone, over an engine without cost.

    PYTHONPATH=python python benchmarks/http_connections.py [--idle 10000] [--streams 2000] [--tokens 100]

Every token of every stream is compared. Exit code 1 if one is missing, wrong or out of order; the last line is JSON
with the figures: how long /health took while the streams ran, what the connections cost in memory, and how even the
streams were served (F-41, F-43). Both sides raise their limit of open files as far as they may. Idle connections are
kept open for the run; the server as shipped closes them after 15 seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import selectors
import socket
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import psutil
from http_stream import TEXT, demo_tokenizer, serve

GET = b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n"
AT_ONCE = 500  # connections that are being made at the same time; the kernel's queue holds some thousands
PROBE_SECONDS = 0.02


def run_server(listener: socket.socket, pause: float) -> None:
    from hybrid_serve.server import process

    process.BoundedProtocol.max_connections = process.raise_file_limit()
    serve(listener, pause, keep_alive=3600)


class Stream:
    """One request, and what came of it so far."""

    def __init__(self, port: int) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port))
        self.seed, self.received, self.num_events = 0, bytearray(), 0

    def ask(self, seed: int, tokens: int) -> None:
        self.seed = seed
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": tokens, "seed": seed}
        data = json.dumps(body).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self.connection.sendall(head + b"content-length: %d\r\n\r\n" % len(data) + data)

    def read(self) -> bool:
        """True when it has ended."""
        piece = self.connection.recv(1 << 18)
        self.received += piece
        self.num_events += piece.count(b"\n\n")
        return not piece or self.received[-40:].find(b"[DONE]") >= 0

    def text(self) -> str:
        lines = self.received.replace(b"\r\n", b"\n").split(b"\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def read_streams(port: int, count: int, tokens: int) -> tuple[list[Stream], float, float]:
    """They, read to their ends; the seconds that took; and how uneven they were served from when the last one had its
    first token to when the first one had its last: the largest number of tokens in that time by the smallest."""
    start = time.perf_counter()
    at_begin: list[int] = []
    at_end: list[int] = []
    with selectors.DefaultSelector() as selector:
        streams = [Stream(port) for _ in range(count)]
        for seed, stream in enumerate(streams):
            stream.ask(seed, tokens)
            selector.register(stream.connection, selectors.EVENT_READ, stream)
        while selector.get_map():
            for key, _ in selector.select():
                if key.data.read():
                    selector.unregister(key.fileobj)
                    key.data.connection.close()
                    at_end = at_end or [each.num_events for each in streams]
            if not at_begin and not at_end and all(each.num_events > 1 for each in streams):
                at_begin = [each.num_events for each in streams]
    served = [later - earlier for earlier, later in zip(at_begin, at_end, strict=False)]
    ratio = max(served) / max(1, min(served)) if served else 0.0
    return streams, time.perf_counter() - start, ratio


def wrong(streams: list[Stream], tokens: int) -> int:
    """How many did not say what they should have, token for token."""
    tokenizer = demo_tokenizer()
    ids = list(tokenizer.encode(TEXT))
    endless = ids * (tokens // len(ids) + 2)
    count = 0
    for stream in streams:
        begin = stream.seed % len(ids)
        count += stream.text() != tokenizer.decode(endless[begin : begin + tokens])
    return count


def get(connection: socket.socket, path: bytes) -> bytes:
    connection.sendall(GET % path)
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = connection.recv(4096)
        if not piece:
            break
        answer += piece
    return answer


def open_idle(port: int, count: int) -> list[socket.socket]:
    """Each has had its answer and stays."""
    found: list[socket.socket] = []
    while len(found) < count:
        new = [socket.create_connection(("127.0.0.1", port)) for _ in range(min(AT_ONCE, count - len(found)))]
        for connection in new:
            connection.sendall(GET % b"/live")
        for connection in new:
            answer = connection.recv(4096)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"connection {len(found) + 1} was refused: {answer[:200]!r}")
        found += new
    return found


def probe(port: int, told: Connection) -> None:
    """Asks /health over new and kept connections in turn until told to stop; sends back the seconds of each."""
    seconds: list[float] = []
    kept = socket.create_connection(("127.0.0.1", port))
    while not told.poll(PROBE_SECONDS):
        begin = time.perf_counter()
        if len(seconds) % 2:
            with socket.create_connection(("127.0.0.1", port)) as fresh:
                get(fresh, b"/health")
        else:
            get(kept, b"/health")
        seconds.append(time.perf_counter() - begin)
    told.send(seconds)


def measure(port: int, server: psutil.Process, chosen: argparse.Namespace) -> dict[str, Any]:
    read_streams(port, 8, 10)
    before = server.memory_info().rss
    begin = time.perf_counter()
    idle = open_idle(port, chosen.idle)
    found: dict[str, Any] = {"idle": len(idle), "open_seconds": round(time.perf_counter() - begin, 2)}
    extra = server.memory_info().rss - before
    found |= {"extra_mib": round(extra / 2**20, 1), "kib_each": round(extra / 2**10 / max(1, len(idle)), 1)}
    ours, theirs = multiprocessing.Pipe()
    prober = multiprocessing.get_context("fork").Process(target=probe, args=(port, theirs), daemon=True)
    prober.start()
    beside, seconds, _ = read_streams(port, chosen.beside, chosen.tokens)
    ours.send("stop")
    times = sorted(ours.recv())
    prober.join()
    found |= {
        "beside": chosen.beside,
        "beside_seconds": round(seconds, 2),
        "beside_wrong": wrong(beside, chosen.tokens),
    }
    found |= {
        f"health_{name}_ms": round(times[int(len(times) * share)] * 1e3, 1)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    found |= {"health_max_ms": round(times[-1] * 1e3, 1), "probes": len(times)}
    found["idle_lost"] = sum(b"HTTP/1.1 200" not in get(connection, b"/live") for connection in idle)
    for connection in idle:
        connection.close()
    used = server.cpu_times()
    streams, seconds, ratio = read_streams(port, chosen.streams, chosen.tokens)
    cpu = server.cpu_times().user + server.cpu_times().system - used.user - used.system
    found |= {"streams": chosen.streams, "tokens": chosen.tokens, "streams_wrong": wrong(streams, chosen.tokens)}
    found |= {"streams_seconds": round(seconds, 2), "tokens_a_cpu_second": round(chosen.streams * chosen.tokens / cpu)}
    found |= {"most_to_least": round(ratio, 2)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--beside", type=int, default=50, help="streams while the idle connections are open")
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=100, help="of each stream")
    parser.add_argument("--pause", type=float, default=0.4, metavar="SECONDS", help="of the engine between two steps")
    chosen = parser.parse_args()
    from hybrid_serve.server.process import raise_file_limit

    raise_file_limit()
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    port = listener.getsockname()[1]
    child = multiprocessing.get_context("fork").Process(target=run_server, args=(listener, chosen.pause), daemon=True)
    child.start()
    listener.close()
    assert child.pid is not None
    found = measure(port, psutil.Process(child.pid), chosen)
    print(json.dumps(found))
    child.terminate()
    child.join()
    return int(bool(found["beside_wrong"] or found["streams_wrong"] or found["idle_lost"]))


if __name__ == "__main__":
    sys.exit(main())
