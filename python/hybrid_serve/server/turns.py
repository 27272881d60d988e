"""Whose turn it is where several keys' requests wait: one that sends many does not hold up another that sends few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

SPACE = 0.0003  # seconds, for a token of the prompt, from one request's turn to the next of its key
MOST_AHEAD = 600.0  # seconds; of a key that sends more than that the rest is served in the order of arrival
# By how much the only request of a key goes ahead, 100,000 tokens: mostly ahead also of what runs already, so that it
# is not the one that gives its blocks up when they are short.
CREDIT = 100_000 * SPACE
_TICKS = 50  # a second; of those since the machine started a priority has room for 2.7 years
_TICK_BITS = 32  # of 64; the other half is for what requests say themselves


@dataclass(slots=True)
class _Key:
    num_open: int
    next: float  # not before; seconds


class Turn:
    """One request's. ``priority``: what an engine is told."""

    def __init__(
        self, priority: int, turns: Turns | None = None, at: float = 0.0, earliest: float = 0.0, space: float = 0.0
    ) -> None:
        """``earliest``: that others could have had; ``space``: behind it to the next one of its key."""
        self.priority, self._turns, self._at, self._earliest, self._space = priority, turns, at, earliest, space

    def came(self) -> None:
        """The engine has begun with the request."""
        if self._turns is not None:
            # Also one that went ahead: those whom it passed by come nearer, so that not any number can.
            self._turns.newest = max(max(self._turns.newest, self._earliest) + self._space, self._at)
            self._turns = None


class Turns:
    """Gives each request of a key a turn behind the last one of the same key, the further the longer that one's prompt,
    and not before that which engines have come to; they take the earliest first. So of one key the order stays, and
    another's comes in between, however far engines are behind. Turns are written as times, which all API servers of a
    machine have in common: while requests wait, the turns that engines come to fall behind the clock. Knows names of
    keys and lengths; not what is asked."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._keys: dict[str, _Key] = {}
        self.newest = 0.0  # of the turns that have come

    @contextmanager
    def taken(self, key: str | None, priority: int, num_tokens: float, longest_wait: float) -> Iterator[Turn]:
        """A request's turn, while the block runs; ``priority``: the request's own, which comes first; ``num_tokens``:
        of its prompts, by the weight of its key; ``longest_wait``: seconds that a request has waited for its place, 0:
        none waits. Without keys everybody is the same."""
        if key is None:
            yield Turn(priority)
            return
        now, space = self._clock(), SPACE * num_tokens
        # Of those that wait, only what goes ahead has an earlier turn than this.
        earliest = min(now, max(now - longest_wait, self.newest))
        state = self._keys.setdefault(key, _Key(0, 0.0))
        at = min(max(earliest, state.next), earliest + MOST_AHEAD) if state.num_open else earliest - CREDIT
        state.next = max(earliest, at) + space
        state.num_open += 1
        try:
            ticks = min(max(int(at * _TICKS), 0), 2**_TICK_BITS - 1)
            yield Turn((priority << _TICK_BITS) + ticks, self, at, earliest, space)
        finally:
            state.num_open -= 1
            if not state.num_open:  # whoever has nothing open owes nothing
                del self._keys[key]
