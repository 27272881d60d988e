"""The way into one model's engines: who finds them full is refused at once, whoever is let in has a seat."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..client import Engine, EngineClient
from ..client.open_counts import OpenCounts
from .errors import ApiError
from .metrics import Metrics


class Seat:
    """The place of one request that is on its way: taken until an engine has been asked for it, or it is over. A
    context for as long as the request is open."""

    __slots__ = ("_entrance",)

    def __init__(self, entrance: Entrance | None = None) -> None:
        self._entrance = entrance

    def __enter__(self) -> Seat:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        if self._entrance is not None:
            self._entrance.left()
            self._entrance = None


class Entrance:
    """Knows how many requests engines have and how many are on their way to them; not what they ask for.

    Engines refuse too, but between two steps, and only what has been read and tokenised: of a burst thousands would
    wait for that."""

    def __init__(
        self, client: EngineClient, metrics: Metrics, open_counts: OpenCounts, most_waiting: Callable[[], int]
    ) -> None:
        """``most_waiting``: how many may wait in each engine, 0 for any number."""
        self._client, self._metrics, self._most_waiting = client, metrics, most_waiting
        self._open_counts, self._first = open_counts, client.engines[0].index
        self.num_entering = 0

    def is_full(self) -> bool:
        """Whether all engines are."""
        return self._room() <= 0

    def would_wait(self) -> bool:
        """Whether a request that is let in could not run yet: every engine has as many as it runs."""
        return all(each.num_open >= each.stats.may_run for each in self._ready())

    def check(self) -> None:
        """Raises ``ApiError`` if there is no room."""
        if self.is_full():
            raise self.refusal()

    def seat(self) -> Seat:
        """For a request. Raises ``ApiError`` if there is no room."""
        seat = self.seat_if_free()
        if seat is None:
            raise self.refusal()
        return seat

    def seat_if_free(self) -> Seat | None:
        if self.is_full():
            return None
        self._enter(1)
        seat = Seat(self)
        if self._room() < 0:  # another API server has taken the last one at this moment; one of us sees it
            seat.leave()
            return None
        return seat

    def refusal(self) -> ApiError:
        """What a request is told that finds them full; counts it."""
        most, engines = self._most_waiting(), self._ready()
        self._metrics.of(engines[0].index).admission_rejections += 1
        num_open = sum([each.num_open for each in engines]) + self._num_on_their_way()
        may = sum([each.stats.may_run + most for each in engines])
        text = f"The engine is full: {num_open} requests run or wait, {may} may. Try again later."
        return ApiError("overloaded", text)

    def _room(self) -> float:
        most, engines = self._most_waiting(), self._ready()
        if not most or not engines:
            return math.inf
        return sum([max(0, each.stats.may_run + most - each.num_open) for each in engines]) - self._num_on_their_way()

    def _ready(self) -> list[Engine]:
        """Those of which it is known how many they run."""
        return [each for each in self._client.engines if each.stats.may_run and each.status.phase == "ready"]

    def _num_on_their_way(self) -> int:
        """Through any API server."""
        return self.num_entering + self._open_counts.entering_elsewhere(self._first)

    def left(self) -> None:
        """A seat was."""
        self._enter(-1)

    def _enter(self, num: int) -> None:
        self.num_entering += num
        self._open_counts.set_entering(self._first, self.num_entering)
