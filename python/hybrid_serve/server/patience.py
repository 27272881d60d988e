"""How long a request may take (P6). Knows times; not what is waited for."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from enum import Enum
from math import inf
from time import monotonic
from typing import NamedTuple, TypeVar

from ..config import SchedulerConfig
from .errors import ApiError, invalid
from .headers import TIMEOUT_HEADER
from .protocol import SamplingRequest

T = TypeVar("T")


class Progress(Enum):
    WAITING = 1
    ADMITTED = 2
    BEGUN = 3  # its first token is there


class Patience(NamedTuple):
    """Seconds from a request's arrival to its admission, its first token, its end, at most."""

    queue: float = inf
    first: float = inf
    whole: float = inf

    @classmethod
    def of(cls, request: SamplingRequest, header: Sequence[bytes], config: SchedulerConfig) -> Patience:
        """What the request says, in its body before its header, and where it says nothing the server. Raises
        ``ApiError`` for a header that is no time."""
        text = header[0].decode("latin-1") if header else ""
        if header and (len(header) > 1 or not re.fullmatch(r"\d{1,5}(\.\d{1,6})?", text) or not float(text)):
            raise invalid(TIMEOUT_HEADER, f"{TIMEOUT_HEADER} is {text[:32]!r}, must be seconds above 0")
        slo = request.ttft_slo_ms or config.ttft_slo_ms
        whole = request.deadline_s or (float(text) if text else 0.0) or config.deadline_s
        queue = request.max_queue_time_s or config.max_queue_time_s
        return cls(queue or inf, slo / 1000 if slo else inf, whole or inf)

    def refuse_hopeless(self, waited: float, expected: float) -> None:
        """``expected``: seconds until there is a place. Raises ``ApiError`` where that is too late already now."""
        most = min(self)
        if waited + expected > most:
            raise _too_long(f"A place is expected in {expected:.1f} s; the request may wait {most:g} s.", expected)

    def left(self, waited: float, progress: Progress, expected: Callable[[], float]) -> float:
        """Seconds until something is late. Raises ``ApiError`` if something is."""
        if waited >= self.whole:
            raise ApiError("deadline_exceeded", f"The reply is not complete after {self.whole:g} s.")
        if progress is Progress.WAITING and waited >= self.queue:
            raise _too_long(f"There was no place for the request within {self.queue:g} s.", expected())
        if progress is not Progress.BEGUN and waited >= self.first:
            raise _too_long(f"There was no token within {self.first:g} s.", expected())
        return min(limit - waited for limit in (*self, waited + 86400) if limit > waited)


ENDLESS = Patience()


def _too_long(message: str, expected: float) -> ApiError:
    error = ApiError("wait_too_long", message, retry_after=max(1, math.ceil(expected)))
    error.type = "overloaded"
    error.more = {"estimated_wait_s": round(expected, 3)}
    return error


async def bounded(
    source: AsyncGenerator[T, None],
    patience: Patience,
    arrived: float,
    progress: Callable[[], Progress],
    expected: Callable[[], float],
) -> AsyncGenerator[T, None]:
    """The items of ``source``, as long as nothing is late. Raises ``ApiError`` then, with ``source`` at its end."""
    while True:
        coming = asyncio.ensure_future(anext(source))
        try:
            while not coming.done():
                left = patience.left(monotonic() - arrived, progress(), expected)
                await asyncio.wait({coming}, timeout=left)
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait({coming})
        try:
            item = coming.result()
        except StopAsyncIteration:
            return
        yield item
