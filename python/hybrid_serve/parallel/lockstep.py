"""Lockstep: replicas whose layers reach across them, as where each has a part of a model's experts, step together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import zmq

from ..sockets import bind_pull, connect_push, readable


class Lockstep:
    """Before each step every replica announces it to every other one and waits for their announcements. A replica
    without work looks at ``is_called`` and joins in with an empty step; so all take the same steps, and while nobody
    has work nobody announces one and all sleep. There is no wave to be opened or closed, and nobody who would do it.

    Knows numbers of steps; no batch, no request. A replica that is lost is lost for all: they begin anew together.
    """

    def __init__(self, context: zmq.Context[Any], addresses: Sequence[str], place: int) -> None:
        """``addresses``: of all replicas; ``place``: which of them is ours."""
        self.socket = bind_pull(context, addresses[place])  # readable when another one calls
        self._others = [connect_push(context, each) for at, each in enumerate(addresses) if at != place]
        self._announced: Counter[int] = Counter()  # step -> by how many others
        self.step = 0

    @property
    def is_called(self) -> bool:
        """Another replica begins the step that is next."""
        while readable(self.socket):
            self._take()
        return self._announced[self.step] > 0

    def begin(self) -> None:
        """Returns when all begin the step."""
        number = self.step.to_bytes(8, "little")
        for other in self._others:
            other.send(number)
        while self._announced[self.step] < len(self._others):
            self._take()
        del self._announced[self.step]
        self.step += 1

    def _take(self) -> None:
        self._announced[int.from_bytes(self.socket.recv(), "little")] += 1
