"""Probation: the requests that ran when an engine died are tried one after another by the next one."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..wire import AddRequest

STEPS = 4  # a suspect that took so many has passed what the engine died of; what was lost on its way out included


class Suspect(NamedTuple):
    client: int
    request: AddRequest
    token_ids: bytes

    @property
    def ids(self) -> range:
        return range(self.request.id, self.request.id + self.request.n)


class Probation:
    """At most one suspect runs on trial; the others are held. So a second death has one cause, and one request ends
    for it. Whoever has passed runs like any other. Knows ids, no scheduler; ``try_out`` is told who is on trial."""

    def __init__(self, try_out: Callable[[bytes], None]) -> None:
        self._try_out = try_out
        self._held: deque[Suspect] = deque()
        self._on_trial: set[int] = set()
        self._steps_left = 0

    @property
    def has_next(self) -> bool:
        return bool(self._held) and not self._on_trial

    @property
    def num_held(self) -> int:
        return len(self._held)

    def hold(self, suspect: Suspect) -> None:
        self._held.append(suspect)

    def next(self) -> Suspect:
        """Who is on trial from now on."""
        suspect = self._held.popleft()
        self._steps_left = STEPS
        self._set_on_trial(set(suspect.ids))
        return suspect

    def stepped(self, ids: Iterable[int]) -> None:
        """These took a step. To be told only while ``is_busy``."""
        if not self._on_trial.isdisjoint(ids):
            self._steps_left -= 1
            if self._steps_left == 0:
                self._set_on_trial(set())

    @property
    def is_busy(self) -> bool:
        return bool(self._on_trial)

    def ended(self, ids: Iterable[int]) -> None:
        """These finished, were aborted or refused: held ones are forgotten, who was on trial has passed."""
        gone = set(ids)
        if self._held:
            self._held = deque(suspect for suspect in self._held if not gone.issuperset(suspect.ids))
        if self._on_trial & gone:
            self._set_on_trial(self._on_trial - gone)

    def _set_on_trial(self, ids: set[int]) -> None:
        self._on_trial = ids
        self._try_out(array("Q", sorted(ids)).tobytes())
