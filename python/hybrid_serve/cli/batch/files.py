"""The two files of a batch: requests, checked line by line before anything runs, and results in the same order.

Because results keep the order of the requests and are only appended, the number of complete lines in the output is all
there is to know about how far a batch came, whatever ended it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from ..usage import UsageError

_LISTED = 20  # bad lines that are named; the rest are counted


class _Envelope(msgspec.Struct):
    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class _Head(msgspec.Struct):
    custom_id: str | None = None


class _Body(msgspec.Struct):
    """What of a body is looked at here; the rest is the server's to judge."""

    stream: msgspec.Raw = msgspec.Raw(b"null")


@dataclass(frozen=True)
class Request:
    """One line. ``problem``: what is wrong with it, then the other fields mean nothing."""

    number: int  # of the line, from 1
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    problem: str = ""


class Result(msgspec.Struct):
    """One line of the output, as OpenAI has it. Either ``response`` or ``error`` is there."""

    id: str
    custom_id: str | None
    response: Response | None
    error: dict[str, str] | None


class Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchInput:
    """The file of requests, read once to check it and once to run it; lines are never all in memory."""

    def __init__(self, path: str) -> None:
        """Raises UsageError if it cannot be read or holds nothing."""
        self.path, self.total = path, 0
        self._problems: dict[int, str] = {}  # by number of line
        seen: dict[str, int] = {}
        try:
            for request in self.requests():
                self.total += 1
                problem, custom_id = request.problem, request.custom_id
                first = request.number if custom_id is None else seen.setdefault(custom_id, request.number)
                if first != request.number:
                    problem = problem or f"custom_id {custom_id!r} is that of line {first}, too"
                if problem:
                    self._problems[request.number] = problem
        except OSError as error:
            raise UsageError(f"-i {path}: {error.strerror}") from None
        if not self.total:
            raise UsageError(f"-i {path}: has no requests")

    def requests(self) -> Iterator[Request]:
        """In order, empty lines left out."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    request = _request(number, line)
                    yield replace(request, problem=self._problems.get(number, request.problem))

    def refuse_problems(self) -> None:
        """Raises UsageError with the lines that are wrong."""
        if self._problems:
            listed = [f"{self.path}:{number}: {problem}" for number, problem in self._problems.items()]
            more = len(listed) - _LISTED
            listed = listed[:_LISTED] + ([f"and {more} more lines"] if more > 0 else [])
            raise UsageError(*listed, "nothing was run; --keep-going makes bad lines error records")


def _request(number: int, line: bytes) -> Request:
    try:
        envelope = msgspec.json.decode(line, type=_Envelope)
        problem = _problem(envelope)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = str(error)
    if not problem:
        return Request(number, envelope.custom_id, envelope.url, bytes(envelope.body))
    try:
        custom_id = msgspec.json.decode(line, type=_Head).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError):
        custom_id = None
    return Request(number, custom_id, problem=problem)


def _problem(envelope: _Envelope) -> str:
    if not envelope.custom_id:
        return "custom_id is empty"
    url = envelope.url
    if not (url.startswith("/") and url.isascii() and url.isprintable() and " " not in url):
        return f"url is {url[:80]!r}, expected a path such as /v1/chat/completions"
    if not bytes(envelope.body).lstrip().startswith(b"{"):
        return "body is not an object"
    if bytes(msgspec.json.decode(envelope.body, type=_Body).stream) == b"true":
        return "body asks for a stream, a batch has none"
    return ""


class OutputGone(OSError):
    """The output file was removed while it was being written."""


class BatchOutput:
    """The file of results: appended to, one writer at a time, never with half a line for longer than a write takes."""

    def __init__(self, path: str, *, resume: bool, overwrite: bool) -> None:
        """Raises UsageError if it cannot be written, is being written by another, or has something in it that neither
        ``resume`` nor ``overwrite`` says what to do with."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"-o {path}: {error.strerror}") from None
        facts = os.fstat(self._fd)
        self._is_file = stat.S_ISREG(facts.st_mode)  # else a pipe or a device
        self._size = 0  # bytes of complete lines
        try:
            if self._is_file:
                self._claim(overwrite=overwrite, may_have_results=resume or not facts.st_size)
        except UsageError:
            os.close(self._fd)
            raise

    def _claim(self, *, overwrite: bool, may_have_results: bool) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"-o {self.path}: another run-batch is writing it") from None
        if overwrite:
            os.ftruncate(self._fd, 0)
        elif not may_have_results:
            raise UsageError(f"-o {self.path}: exists; --resume goes on where it ends, --overwrite starts anew")

    def count_done(self, requests: Iterator[Request]) -> int:
        """How many of the requests, from the first on, have their result; half a line at the end is cut off. Raises
        UsageError if the results are not those of these requests."""
        if not self._is_file:
            return 0
        count = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._check_same(line, count + 1, next(requests, None))
                self._size += len(line)
                count += 1
        os.ftruncate(self._fd, self._size)
        os.lseek(self._fd, self._size, os.SEEK_SET)
        return count

    def _check_same(self, line: bytes, number: int, request: Request | None) -> None:
        try:
            custom_id = msgspec.json.decode(line, type=_Head).custom_id
        except msgspec.DecodeError:
            raise UsageError(f"{self.path}:{number}: is no result; --overwrite starts anew") from None
        if request is None or custom_id != request.custom_id:
            wanted = "is one line too many" if request is None else f"should be of {request.custom_id!r}"
            raise UsageError(
                f"{self.path}:{number}: of {custom_id!r}, {wanted}: of another input? --overwrite starts anew"
            )

    def append(self, results: Sequence[Result]) -> None:
        """Writes whole lines or none. Raises OSError: nothing of them is left in the file then."""
        data = memoryview(b"".join(msgspec.json.encode(result) + b"\n" for result in results))
        if self._is_file and os.fstat(self._fd).st_nlink == 0:
            raise OutputGone(errno.ENOENT, "it was removed while it was being written")
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            if self._is_file:
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)
            raise
        self._size += len(data)

    def close(self) -> None:
        """To the disk, so that a result that was counted is there after a power failure."""
        if self._is_file:
            os.fsync(self._fd)
        os.close(self._fd)
