"""What an engine and its worker say to each other: small messages over one socket; batches are in shared arenas.

The engine asks, the worker answers in the same order; ``Bind``, ``Submit`` are asked without an answer.
"""

from __future__ import annotations

import socket
from collections import namedtuple
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..config import Config
from ..wire import StartupFailure
from .executor import ExecutorFacts, StepResult

# What a batch is, apart from its columns. As the core has it, so that this is no second list.
BATCH_FIELDS = tuple(sorted(name for name in vars(_core.Batch) if not name.startswith("_")))
SentBatch = namedtuple("SentBatch", BATCH_FIELDS)  # type: ignore[misc]
_LENGTH_BYTES = 4


class Start(msgspec.Struct, tag=True):
    """First and only once; it holds keys, which arguments would show. Answered by ``Progress``, ``Loaded``."""

    config: Config
    load: str  # "module:function", an ``executor.Load``
    name: str


class Allocate(msgspec.Struct, tag=True):
    """Answered by ``Allocated``."""


class Bind(msgspec.Struct, tag=True):
    """Followed by one byte that carries the arenas' file descriptors."""

    num_arenas: int
    layout: dict[str, tuple[int, str, int]]


class Submit(msgspec.Struct, tag=True):
    """``batch``: in the order of ``BATCH_FIELDS``."""

    batch: list[int | bool]


class Await(msgspec.Struct, tag=True):
    """The oldest step that was not awaited. Answered by ``Result``."""


class AskPreparation(msgspec.Struct, tag=True):
    """Answered by ``Preparation``."""


class Prepare(msgspec.Struct, tag=True):
    """Does the work that ``Preparation`` said there is; answered by it."""


Request = Start | Allocate | Bind | Submit | Await | AskPreparation | Prepare


class Progress(msgspec.Struct, tag=True):
    phase: str
    share: float


class Loaded(msgspec.Struct, tag=True):
    depth: int


class Allocated(msgspec.Struct, tag=True):
    facts: ExecutorFacts


class Result(msgspec.Struct, tag=True):
    """A ``StepResult`` as bytes; ``width`` 0: without log-probabilities."""

    tokens: bytes
    width: int = 0
    logprobs: bytes = b""
    logprob_ids: bytes = b""
    ranks: bytes = b""

    @staticmethod
    def of(result: StepResult) -> Result:
        tokens = np.ascontiguousarray(result.tokens, np.int32).tobytes()
        if result.logprobs is None or result.logprob_ids is None or result.ranks is None:
            return Result(tokens)
        width = result.logprobs.shape[1]
        return Result(tokens, width, result.logprobs.tobytes(), result.logprob_ids.tobytes(), result.ranks.tobytes())


class Preparation(msgspec.Struct, tag=True):
    exists: bool


class Failed(msgspec.Struct, tag=True):
    """Instead of any answer; the worker does nothing more. ``failure``: of a start that was refused."""

    text: str
    failure: StartupFailure | None = None


Answer = Progress | Loaded | Allocated | Result | Preparation | Failed


class ReceivedResult:
    """A ``StepResult`` again."""

    def __init__(self, sent: Result) -> None:
        self.tokens: NDArray[np.int32] = np.frombuffer(sent.tokens, np.int32)
        self.logprobs: NDArray[np.float32] | None = None
        self.logprob_ids: NDArray[np.int32] | None = None
        self.ranks: NDArray[np.int32] | None = None
        if sent.width:
            self.logprobs = np.frombuffer(sent.logprobs, np.float32).reshape(-1, sent.width)
            self.logprob_ids = np.frombuffer(sent.logprob_ids, np.int32).reshape(-1, sent.width)
            self.ranks = np.frombuffer(sent.ranks, np.int32)


class Channel:
    """One end of the socket. Knows messages, not their order."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        """``receives``: ``Request`` or ``Answer``."""
        self.socket, self._decoder = sock, msgspec.msgpack.Decoder(receives)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: Request | Answer) -> None:
        """Raises OSError if the other one is gone."""
        data = self._encoder.encode(message)
        self.socket.sendall(len(data).to_bytes(_LENGTH_BYTES, "little") + data)

    def receive(self) -> Any:
        """Waits. Raises EOFError or OSError if the other one is gone."""
        return self._decoder.decode(self._read(int.from_bytes(self._read(_LENGTH_BYTES), "little")))

    def send_fds(self, fds: list[int]) -> None:
        socket.send_fds(self.socket, [b"f"], fds)

    def receive_fds(self, count: int) -> list[int]:
        _, fds, _, _ = socket.recv_fds(self.socket, 1, count)
        if len(fds) != count:
            raise EOFError(f"{len(fds)} of {count} file descriptors came")
        return fds

    def _read(self, size: int) -> bytearray:
        data, filled = bytearray(size), 0
        view = memoryview(data)
        while filled < size:
            count = self.socket.recv_into(view[filled:])
            if not count:
                raise EOFError("the other process is gone")
            filled += count
        return data
