"""A burst: requests that come at their times whether or not earlier ones have an answer, most of them more than the
server takes (F-44).

    python benchmarks/http_burst.py [--model MODEL] [--requests 5000] [--seconds 1] [-- WORDS OF serve]

Starts `hybrid-serve serve MODEL` (the demo model if none is named) with room for --waiting requests beside the
--running ones. Each request has a connection of its own; its time begins when it should have been sent, so what this
program or the server's queue of connections holds up counts. One process sends some 5,000 a second on time; --clients N
shares them among N. Before and after the burst as many requests as may run are timed. The last line is JSON with the
figures; exit code 1 if a request has no whole answer, or one that is neither 200 nor 503.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, cast

import uvloop

TOKENS = 12
WISH = 0.05  # seconds, for a refusal
BODY = json.dumps({"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}).encode()
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n" % len(BODY)
) + BODY


class Request(asyncio.Protocol):
    """One of them; ``seconds`` from when it was due to when all of its answer was there."""

    def __init__(self, due: float, done: asyncio.Future[None]) -> None:
        self._due, self._done, self._received = due, done, bytearray()
        self.seconds, self.status = 0.0, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(REQUEST)

    def data_received(self, data: bytes) -> None:
        self._received += data
        self.seconds = time.monotonic() - self._due

    def connection_lost(self, error: Exception | None) -> None:
        head, _, body = bytes(self._received).partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 ") and is_whole(head, body):
            self.status = int(head[9:12])
        self._done.set_result(None)


def is_whole(head: bytes, body: bytes) -> bool:
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    is_refusal = head.startswith(b"HTTP/1.1 503")
    if not lengths or (is_refusal and b"retry-after:" not in head.lower()):
        return False
    return len(body) == int(lengths[0].split(b":")[1]) and (is_refusal or b'"finish_reason":"length"' in body)


class Answer(NamedTuple):
    status: int  # 0: no whole answer
    seconds: float


def ask(port: int, dues: list[float]) -> list[Answer]:
    """A request at each of these times of the machine's monotonic clock; returns when all have ended."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    requests = uvloop.run(ask_all(port, dues))
    return [Answer(request.status, request.seconds) for request in requests]


async def ask_all(port: int, dues: list[float]) -> list[Request]:
    loop = asyncio.get_running_loop()
    ends: list[asyncio.Future[None]] = []
    requests: list[Request] = []

    async def one(due: float) -> None:
        done = loop.create_future()
        requests.append(Request(due, done))
        ends.append(done)
        try:
            await loop.create_connection(lambda request=requests[-1]: request, "127.0.0.1", port)  # type: ignore[misc]
        except OSError:
            done.set_result(None)

    opening = []
    for due in dues:
        if due > time.monotonic():
            await asyncio.sleep(due - time.monotonic())
        opening.append(asyncio.ensure_future(one(due)))
    await asyncio.gather(*opening)
    await asyncio.gather(*ends)
    return requests


def serve(model: str, chosen: argparse.Namespace) -> tuple[subprocess.Popen[bytes], int]:
    """Ready."""
    limits = ["--max-num-queued-reqs", str(chosen.waiting), "--max-num-seqs", str(chosen.running)]
    words = [sys.executable, "-m", "hybrid_serve", "serve", *([model] if model else []), *limits, "--port", "0"]
    server = subprocess.Popen([*words, *chosen.server], stdout=subprocess.PIPE, stderr=sys.stderr)
    assert server.stdout is not None
    port = 0
    for line in server.stdout:
        if b" is bound" in line:
            port = int(line.split(b" is bound")[0].rsplit(b":", 1)[1])
        if line.startswith(b"ready in"):
            break
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                return server, port
        except urllib.error.HTTPError:
            time.sleep(0.05)


def percentile(values: list[float], share: float) -> float:
    return round(values[min(len(values) - 1, int(len(values) * share))] * 1e3, 1) if values else 0.0


def measure(port: int, chosen: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    def all_of(count: int, seconds: float) -> list[Answer]:
        """``count`` requests, evenly over so many seconds."""
        began = time.monotonic() + 0.1
        dues = [began + seconds * number / count for number in range(count)]
        parts = [pool.submit(ask, port, dues[first :: chosen.clients]) for first in range(chosen.clients)]
        return [answer for part in parts for answer in part.result()]

    def at_once() -> float:
        return max(answer.seconds for answer in all_of(chosen.running, 0.0))

    at_once()
    before = at_once()
    burst = all_of(chosen.requests, chosen.seconds)
    after = at_once()
    taken = sorted(each.seconds for each in burst if each.status == 200)
    refused = sorted(each.seconds for each in burst if each.status == 503)
    return {
        "requests": len(burst),
        "taken": len(taken),
        "refused": len(refused),
        "wrong": len(burst) - len(taken) - len(refused),
        "refused_p50_ms": percentile(refused, 0.5),
        "refused_p90_ms": percentile(refused, 0.9),
        "refused_p99_ms": percentile(refused, 0.99),
        "refused_late": sum(seconds > WISH for seconds in refused),
        "refused_max_ms": percentile(refused, 1.0),
        "taken_p50_ms": percentile(taken, 0.5),
        "taken_max_ms": percentile(taken, 1.0),
        "batch_before_seconds": round(before, 3),
        "batch_after_seconds": round(after, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=1.0, help="over which they come")
    parser.add_argument("--waiting", type=int, default=512)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--clients", type=int, default=1, help="processes that send them")
    parser.add_argument("server", nargs="*", help="after --: further words for `hybrid-serve serve`")
    chosen = parser.parse_args()
    server, port = serve(chosen.model, chosen)
    try:
        with ProcessPoolExecutor(chosen.clients, multiprocessing.get_context("spawn")) as pool:
            found = measure(port, chosen, pool)
    finally:
        server.terminate()
        server.wait()
    print(json.dumps(found))
    return int(found["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
