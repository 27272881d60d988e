"""Router: which engine a request goes to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

TOKEN_BYTES = 4
SHORTEST_PREFIX = 64  # tokens: fewer are computed sooner than a longer queue is
MOST_PREFIXES = 65536
SLACK = 4.0  # requests, and a quarter more, that an engine may have above the least loaded one for a prefix's sake


class Router:
    """Gives a request to the least loaded engine, in turn where several are; with ``has_affinity`` to the one that was
    last given the longest beginning of its prompt, unless that one has much more to do than another.

    Knows loads and prompts; no socket. What it remembers is of one API server: another may place a prefix elsewhere."""

    def __init__(self, has_affinity: bool, turn: int = 0) -> None:
        """``turn``: where it begins, so that several API servers do not all begin with the same engine."""
        self._turn = turn
        self._prefixes: OrderedDict[int, int] | None = OrderedDict() if has_affinity else None

    def pick(self, loads: Mapping[int, float], prompt: bytes, salt: bytes) -> int:
        """``loads``: of those that can be picked, at least one; ``prompt``: i32; ``salt``: of its cache."""
        least = min(loads.values())
        equal = [index for index, load in loads.items() if load == least]
        chosen = equal[self._turn % len(equal)]
        self._turn += 1
        if self._prefixes is None:
            return chosen
        keys = [hash((salt, prompt[: length * TOKEN_BYTES])) for length in _lengths(len(prompt) // TOKEN_BYTES)]
        most = least * 1.25 + SLACK
        for key in keys:
            last = self._prefixes.get(key)
            if last is not None and loads.get(last, most + 1) <= most:
                chosen = last
                break
        for key in reversed(keys):
            self._prefixes[key] = chosen
            self._prefixes.move_to_end(key)
        while len(self._prefixes) > MOST_PREFIXES:
            self._prefixes.popitem(last=False)
        return chosen


def _lengths(num_tokens: int) -> list[int]:
    """Of the beginnings that are remembered, longest first: each twice the next."""
    found = []
    length = SHORTEST_PREFIX
    while length <= num_tokens:
        found.append(length)
        length *= 2
    return found[::-1]
