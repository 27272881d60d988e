"""Whether requests are taken: loading, ready, draining; and how open ones are ended. Knows no route and no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..client import EngineClient
from ..wire import Status
from .errors import ApiError

# Nobody need be refused for long: these end by themselves.
_PASSING = ("starting", "loading_weights", "allocating", "restarting", "not_responding")


class Lifecycle:
    """The phases of one API server:

    loading -> ready -> draining (no new requests, open ones run on) -> cut (open ones get an error, now)
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self.text_is_loaded = False
        self.on_ready: Callable[[], None] | None = None  # called once, when requests are taken for the first time
        self.draining = False
        self.num_open = 0
        self._num_waiting = 0
        self._changed: asyncio.Future[None] | None = None
        self._cut: asyncio.Future[None] | None = None
        self._idle: asyncio.Event | None = None

    @property
    def status(self) -> Status:
        """Of the engines together."""
        return self._client.status

    def phase(self) -> str:
        """What ``/ready`` says: ``ready``, ``draining``, or the engine's phase while it is not ready."""
        if self.draining:
            return "draining"
        phase = self.status.phase
        if phase == "ready" and not (self.text_is_loaded and self._client.facts):
            return "starting"
        return phase

    def check(self) -> None:
        """Raises the ``ApiError`` that a new request gets now, if any."""
        phase = self.phase()
        if phase == "ready":
            return
        if phase == "draining":
            raise ApiError("draining", "The server is shutting down and takes no new requests.")
        if phase == "dead":
            raise ApiError("engine_dead", "The engine is not running.")
        if phase in ("restarting", "not_responding"):
            raise ApiError("engine_restarting", "The engine is being restarted. Try again shortly.")
        status = self.status
        percent = f" ({status.progress:.0%})" if status.progress else ""
        raise ApiError("model_loading", f"The model is still loading: {phase.replace('_', ' ')}{percent}.")

    def check_unless_passing(self, most_waiting: int) -> None:
        """Raises the ``ApiError`` of a new request that would wait, and may not; ``most_waiting``: 0 for any number."""
        if self.phase() not in _PASSING:
            self.check()
        elif most_waiting and self._num_waiting >= most_waiting:
            text = f"{self._num_waiting} requests wait for the model, {most_waiting} may."
            raise ApiError("overloaded", text)

    async def passed(self) -> None:
        """Waits until the model is there, or will not be; then as ``check``."""
        self._num_waiting += 1
        try:
            while self.phase() in _PASSING:
                if self._changed is None:
                    self._changed = asyncio.get_running_loop().create_future()
                await asyncio.shield(self._changed)
        finally:
            self._num_waiting -= 1
        self.check()

    def changed(self) -> None:
        """Something that ``phase`` depends on has: whoever waits looks again."""
        if self.on_ready is not None and self.phase() == "ready":
            self.on_ready()
            self.on_ready = None
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    @property
    def cut(self) -> asyncio.Future[None]:
        """Done when open requests must end at once."""
        if self._cut is None:
            self._cut = asyncio.get_running_loop().create_future()
        return self._cut

    def opened(self) -> None:
        self.num_open += 1

    def closed(self) -> None:
        self.num_open -= 1
        if self.num_open == 0 and self._idle is not None:
            self._idle.set()

    def begin_drain(self) -> None:
        self.draining = True
        self.changed()

    def cut_now(self) -> None:
        self.draining = True
        if not self.cut.done():
            self.cut.set_result(None)

    async def drained(self, timeout: float) -> bool:
        """Waits until no request is open; after ``timeout`` seconds cuts what is left and returns False."""
        self._idle = asyncio.Event()
        if self.num_open == 0:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            self.cut_now()
            return False
        return True
