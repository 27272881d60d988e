"""Sends the requests of a batch to a server, many at a time, and hands on their results in order."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from ..http_client import HttpClient, HttpFailure
from .files import Request, Response, Result

RETRIED = (429, 503)  # the server is busy, loading, or getting its engine back
MAX_TRIES = 10
LONGEST_PAUSE = 5.0  # seconds between tries
_AHEAD = 4  # times the requests under way: how many results may wait for an earlier one


class Driver:
    """One pass over some requests. Knows no file and no process.

    ``write`` gets each run of finished results, in the order of the requests; what it raises ends the pass. ``stop``
    may be called from any thread: what is under way is still awaited, nothing new is sent.
    """

    def __init__(self, client: HttpClient, max_inflight: int, write: Callable[[list[Result]], None]) -> None:
        self._client, self._write, self._window = client, write, max_inflight * _AHEAD
        self._gate = asyncio.Semaphore(max_inflight)
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()

    async def run(self, requests: Iterator[Request]) -> None:
        """Returns when every request has its result, or after ``stop``."""
        pending: deque[asyncio.Task[Result | None]] = deque()
        try:
            while True:
                while len(pending) < self._window and (request := next(requests, None)) is not None:
                    pending.append(asyncio.create_task(self._result(request)))
                if not pending:
                    return
                await pending[0]
                finished: list[Result] = []
                while pending and pending[0].done():
                    result = pending.popleft().result()
                    if result is None:  # stopped before it was answered: nothing after it can be written either
                        self._write(finished)
                        return
                    finished.append(result)
                self._write(finished)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            self._client.close()

    async def _result(self, request: Request) -> Result | None:
        """None: the batch is being stopped."""
        name = f"batch_req_{request.number}"
        if request.problem:
            problem = {"code": "invalid_line", "message": f"line {request.number}: {request.problem}"}
            return Result(name, request.custom_id, None, problem)
        failure = ""
        async with self._gate:
            for attempt in range(1, MAX_TRIES + 1):
                if self._stopping.is_set():
                    return None
                try:
                    async with self._client.request("POST", request.url, request.body) as answer:
                        body = await answer.read()
                    if answer.status not in RETRIED or attempt == MAX_TRIES:
                        request_id = answer.headers.get("x-request-id", "")
                        response = Response(answer.status, request_id, _one_line(body))
                        return Result(name, request.custom_id, response, None)
                    failure, pause = f"HTTP {answer.status}", _seconds(answer.headers.get("retry-after", ""))
                except HttpFailure as error:
                    failure, pause = str(error), 1.0
                if not await self._pause(pause):
                    return None
        return Result(name, request.custom_id, None, {"code": "connection_error", "message": failure})

    async def _pause(self, seconds: float) -> bool:
        """False: the batch is being stopped."""
        end = asyncio.get_running_loop().time() + seconds
        while not self._stopping.is_set() and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.1)
        return not self._stopping.is_set()


def _one_line(body: bytes) -> msgspec.Raw:
    """The body as JSON without line breaks; text that is not JSON as a string."""
    try:
        if b"\n" not in body:
            msgspec.json.decode(body, type=msgspec.Raw)
            return msgspec.Raw(body)
        return msgspec.Raw(msgspec.json.encode(msgspec.json.decode(body)))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.Raw(msgspec.json.encode(body.decode(errors="replace")))


def _seconds(text: str) -> float:
    return min(float(text), LONGEST_PAUSE) if text.isdigit() else 1.0
