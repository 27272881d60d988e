"""How many requests each API server has in each engine, and on the way there, for all of them to see at once."""

from __future__ import annotations

from ..shared_memory import OPEN_SLOT_BYTES

_NUMBER_BYTES = 8
_NUM_ENGINES = OPEN_SLOT_BYTES // _NUMBER_BYTES // 2


class OpenCounts:
    """Two numbers for each engine, in a slot for each API server: written by it alone, and each of them whole. Knows
    numbers, not what a request is.

    Engines tell too what they have, but between two steps."""

    def __init__(self, memory: memoryview | None = None, index: int = 0) -> None:
        """``memory``: OPEN_SLOT_BYTES for each API server, none: there is no other; ``index``: which of them we are."""
        memory = memoryview(bytearray(OPEN_SLOT_BYTES)) if memory is None else memory
        self._numbers = memory.cast("q")
        self._own = index * 2 * _NUM_ENGINES
        slots = range(0, len(self._numbers), 2 * _NUM_ENGINES)
        self._others = [start for start in slots if start != self._own]

    @staticmethod
    def check(engine: int) -> None:
        """Raises ValueError for an index that there is no place for."""
        if not 0 <= engine < _NUM_ENGINES:
            raise ValueError(f"engine {engine} has no place, there are {_NUM_ENGINES}")

    def clear(self) -> None:
        """What an earlier process of our index left is not ours."""
        self._numbers[self._own : self._own + 2 * _NUM_ENGINES] = memoryview(bytes(OPEN_SLOT_BYTES)).cast("q")

    def set_in_engine(self, engine: int, count: int) -> None:
        self._numbers[self._own + engine] = count

    def in_engine_elsewhere(self, engine: int) -> int:
        """Of other API servers."""
        return sum([self._numbers[start + engine] for start in self._others])

    def set_entering(self, engine: int, count: int) -> None:
        """Those that no engine has been asked for yet; of several engines of a model, they count for the first."""
        self._numbers[self._own + _NUM_ENGINES + engine] = count

    def entering_elsewhere(self, engine: int) -> int:
        """Of other API servers."""
        return sum([self._numbers[start + _NUM_ENGINES + engine] for start in self._others])
