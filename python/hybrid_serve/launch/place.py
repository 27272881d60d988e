"""Place: one model of several, as the supervisor sees it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from ..served import Budget, ServedModel
from ..wire import ModelState, Status, Use


class Place:
    """Whether the model is in memory and what API servers do with it. Knows no process and no other model.

    unloaded -> loading -> ready -> draining -> unloaded; failed: it could not be loaded, or died too often.
    """

    def __init__(self, model: ServedModel) -> None:
        self.model, self.name = model, model.name
        self.phase, self.message, self.drain = "unloaded", "", 0
        self.is_ordered = model.at_start  # somebody wants it loaded, whether or not requests wait
        self.is_unwanted = False  # somebody wants it put away
        self.used_at = 0.0  # when a request was let in or ended last, or else when it was loaded
        self.wanted_since: float | None = None
        self.statuses = {index: Status("unloaded", engine=index) for index in model.engines}
        self._uses: dict[bytes, Use] = {}  # by API server

    @property
    def state(self) -> ModelState:
        return ModelState(self.name, self.phase, self.message, self.drain)

    @property
    def is_in_memory(self) -> bool:
        return self.phase in ("loading", "ready", "draining")

    @property
    def is_waited_for(self) -> bool:
        return any(use.is_waited_for for use in self._uses.values())

    @property
    def is_open(self) -> bool:
        return any(use.is_open for use in self._uses.values())

    @property
    def is_wanted(self) -> bool:
        return self.phase == "unloaded" and (self.is_ordered or self.is_waited_for)

    @property
    def may_go(self) -> bool:
        """Not before it has served those who waited for it: else two models could push each other out for ever."""
        return self.phase == "ready" and not self.is_waited_for

    def greet(self, api_server: bytes) -> None:
        """It has just come, perhaps in another's place."""
        self._uses[api_server] = Use(self.name)

    def took(self, api_server: bytes, use: Use, now: float) -> None:
        if use.is_open or self.is_open:
            self.used_at = now
        self._uses[api_server] = use
        self.note_wanted(now)

    def note_wanted(self, now: float) -> None:
        if not self.is_wanted:
            self.wanted_since = None
        elif self.wanted_since is None:
            self.wanted_since = now

    def begin_drain(self) -> None:
        self.phase, self.is_unwanted = "draining", False
        self.drain += 1

    @property
    def is_drained(self) -> bool:
        """Every API server knows of the drain, and none has a request here any more."""
        return self.phase == "draining" and all(
            use.drain == self.drain and not use.is_open for use in self._uses.values()
        )

    def said(self, status: Status) -> Status:
        """Of one of its engines: the same with the facts that are known of it."""
        before = self.statuses[status.engine]
        status = msgspec.structs.replace(status, facts=status.facts or before.facts)
        self.statuses[status.engine] = status
        return status

    @property
    def is_served(self) -> bool:
        return all(status.phase == "ready" for status in self.statuses.values())


def to_put_away(wanted: Place, places: Iterable[Place], budget: Budget) -> list[Place] | None:
    """Those that must go to make room, the one unused for longest first, one in use last; empty: none, room is there
    or on its way; None: as long as nothing changes there is no room."""
    in_memory = [place for place in places if place.is_in_memory]
    staying = [place for place in in_memory if place.phase != "draining"]
    going: list[Place] = []
    candidates = sorted((place for place in staying if place.may_go), key=lambda each: (each.is_open, each.used_at))
    while not holds(budget, [*staying, wanted]):
        if not candidates:
            return None
        going.append(candidates.pop(0))
        staying.remove(going[-1])
    return going


def holds(budget: Budget, places: Collection[Place]) -> bool:
    return budget.holds([place.model for place in places])
