"""Whose turn it is where several keys' requests wait: one that sends many does not hold up another that sends few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

PACE = 0.05  # seconds from one admission to the next, where no engine has measured it
MOST_AHEAD = 60.0  # seconds; a key that sends more than that is served in the order of arrival beyond it
_TICKS = 50  # a second; of those since the machine started a priority has room for 2.7 years
_TICK_BITS = 32  # of 64; the other half is for what requests say themselves


@dataclass(slots=True)
class _Key:
    num_open: int
    next: float  # not before; seconds


class Turns:
    """Gives a request the time at which it would have come if its key sent them no faster than engines let them in, and
    engines take the earliest first. Of one key the order stays; another's comes in between. All API servers of a
    machine have the same clock. Knows names of keys; not what is asked."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._keys: dict[str, _Key] = {}

    @contextmanager
    def taken(self, key: str | None, priority: int, pace: float) -> Iterator[int]:
        """The engine's priority of a request, while the block runs; ``priority``: the request's own, which comes first.
        ``pace``: 0 where none is known. Without keys everybody is the same."""
        if key is None:
            yield priority
            return
        now = self._clock()
        state = self._keys.setdefault(key, _Key(0, now))
        at = min(max(now, state.next), now + MOST_AHEAD)
        state.next = at + (pace or PACE)
        state.num_open += 1
        try:
            yield (priority << _TICK_BITS) + min(int(at * _TICKS), 2**_TICK_BITS - 1)
        finally:
            state.num_open -= 1
            if not state.num_open:  # whoever has nothing open owes nothing
                del self._keys[key]
