"""Several models, of which some are in memory: the requests of one that is not wait here until it is."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec

from ..client import Engine
from ..client.models_client import ModelsClient
from ..config import Config
from ..errors import StartupError
from ..served import ServedModel
from ..wire import ModelState, Order, Status, Use
from .context import ServerContext, TextModel
from .errors import ApiError
from .exposition import OfModel
from .keys import Key
from .lifecycle import Lifecycle

log = logging.getLogger(__name__)
LoadText = Callable[[Config], "asyncio.Future[TextModel]"]
_SETTLED = ("ready", "draining", "failed")


class SeveralLifecycle(Lifecycle):
    """Of a server whose models come and go: it takes requests of all of them, and is ready when those that are to be
    there from the start are, or cannot be."""

    def __init__(self, models: Models) -> None:
        super().__init__(models.client_of_first)
        self._models = models

    @property
    def status(self) -> Status:
        return self._models.status

    def phase(self) -> str:
        return "draining" if self.draining else self.status.phase

    def check(self) -> None:
        if self.draining or self.phase() == "dead":
            super().check()

    def changed(self) -> None:
        super().changed()
        self._models.changed()


class Gate:
    """One model's: requests go in while it is ready, and wait in front while it is not. What API servers do with it
    is what the supervisor decides by, so that every change is said. Knows no request and no other model."""

    def __init__(self, context: ServerContext, client: ModelsClient, lifecycle: Lifecycle, load_text: LoadText) -> None:
        """``context``: the model's; ``lifecycle``: the server's."""
        self.context, self._client, self._lifecycle, self._load_text = context, client, lifecycle, load_text
        self.name = context.model_names[0]
        self.state = ModelState(self.name, "unloaded")
        self.num_open = self.num_waiting = 0
        self.was_settled = False  # it was there, or could not be
        self._said = Use(self.name)
        self._num_put_away = 0
        self._text: asyncio.Future[TextModel] | None = None
        self._text_failure = ""
        self._changed: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        return self.state.phase == "ready" and self.context.lifecycle.phase() == "ready"

    def takes_requests(self) -> bool:
        """Also such as must wait."""
        return self._lifecycle.phase() == "ready" and self.state.phase != "failed"

    @property
    def message(self) -> str:
        return self.state.message or self._text_failure

    async def enter(self) -> None:
        """Waits until the model is there. Raises the ``ApiError`` of a request that cannot have it, or may not wait."""
        if not self.is_open:
            self._begin_text()
            await self._wait()
        self.num_open += 1
        self._say()

    def leave(self) -> None:
        self.num_open -= 1
        self._say()

    async def load(self) -> None:
        """As ``enter``, also where it has just failed."""
        self._client.order(Order(self.name, is_load=True))
        if self.state.phase == "failed":  # until the supervisor answers
            self.state = ModelState(self.name, "unloaded", drain=self.state.drain)
        await self.enter()
        self.leave()

    async def put_away(self) -> None:
        """Returns when its requests have ended and its memory is free. Raises ``ApiError``."""
        before = self._num_put_away
        self._client.order(Order(self.name, is_load=False))
        while self._num_put_away == before:
            self._lifecycle.check()
            await self._next_change()

    def take_state(self, state: ModelState) -> None:
        self.state = state
        self.was_settled = self.was_settled or state.phase in _SETTLED
        self._num_put_away += state.phase in ("unloaded", "failed")
        self._say()
        self.changed()

    def changed(self) -> None:
        """Whoever waits looks again."""
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    async def _wait(self) -> None:
        self._check()
        most = self.context.config.scheduler.max_num_queued_reqs
        if most and self.num_waiting >= most:
            self.context.metrics.of(self.context.client.engines[0].index).admission_rejections += 1
            text = f"{self.num_waiting} requests wait for the model {self.name}, {most} may."
            raise ApiError("overloaded", text)
        self.num_waiting += 1
        self._say()
        try:
            while not self.is_open:
                self._check()
                await self._next_change()
        except BaseException:
            self.num_waiting -= 1
            self._say()
            raise
        self.num_waiting -= 1  # said together with what comes of it

    def _check(self) -> None:
        self._lifecycle.check()
        if self.state.phase == "failed" or self._text_failure:
            raise ApiError("model_failed", f"The model '{self.name}' could not be loaded: {self.message}")

    async def _next_change(self) -> None:
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    def _say(self) -> None:
        use = Use(self.name, self.num_open > 0, self.num_waiting > 0, self.state.drain)
        if use != self._said:
            self._said = use
            self._client.say(use)

    def _begin_text(self) -> None:
        """The text side is loaded when it is first needed, beside the engine, and stays."""
        if self.context.text_model is None and self._text is None:
            self._text_failure = ""
            self._text = self._load_text(self.context.config)
            self._text.add_done_callback(self._end_text)

    def _end_text(self, loaded: asyncio.Future[TextModel]) -> None:
        self._text = None
        if loaded.cancelled():
            return
        error = loaded.exception()
        if error is None:
            self.context.set_text_model(loaded.result())
        else:
            failure = error.failure if isinstance(error, StartupError) else None
            self._text_failure = f"{failure.what}: {failure.why}" if failure else type(error).__name__
            message = "model %s: its tokenizer could not be loaded: %s"
            log.error(message, self.name, error, exc_info=None if failure else error)
        self.changed()


class Models:
    """The gates of one API server, by the names that clients use. Knows no route."""

    def __init__(
        self,
        front: ServerContext,
        client: ModelsClient,
        models: Sequence[ServedModel],
        load_text: LoadText,
    ) -> None:
        """Makes ``front`` the context of a server of these models."""
        self._front, self._client = front, client
        self.client_of_first = client.models[models[0].name]
        self._at_start = [model.name for model in models if model.at_start]
        front.lifecycle = lifecycle = SeveralLifecycle(self)
        front.model_names, front.models = tuple(model.name for model in models), self
        self.gates: dict[str, Gate] = {}
        for model in models:
            context = ServerContext(model.config, client.models[model.name], front.api_index, front=front)
            self.gates[model.name] = Gate(context, client, lifecycle, load_text)
        front.exposition.models = [
            OfModel(gate.name, gate.context.client, gate.takes_requests, gate.context.config.cache)
            for gate in self.gates.values()
        ]
        client.on_model = lambda state: self.gates[state.name].take_state(state)

    @asynccontextmanager
    async def serving(self, name: str | None, key: Key | None) -> AsyncIterator[ServerContext]:
        """The context of the model that a request of that key names, which stays in memory as long as the block runs.
        Raises ``ApiError``."""
        gate = self.gate(name, key)
        await gate.enter()
        try:
            yield gate.context
        finally:
            gate.leave()

    def gate(self, name: str | None, key: Key | None = None) -> Gate:
        """Raises ``ApiError`` (404)."""
        return self.gates[self._front.check_model(name, key)]

    @property
    def engines(self) -> Sequence[Engine]:
        return self._client.engines

    @property
    def status(self) -> Status:
        """Of the whole server."""
        if self._client.is_dead:
            return Status("dead")
        missing = [name for name in self._at_start if not self.gates[name].was_settled]
        if not missing:
            return Status("ready")
        status = self.gates[missing[0]].context.client.status
        return msgspec.structs.replace(status, phase="loading_weights") if status.phase == "ready" else status

    def num_open(self) -> Counter[str]:
        return Counter({name: gate.num_open for name, gate in self.gates.items()})

    def take_news(self) -> None:
        """See ``ServerContext.take_news``."""
        for gate in self.gates.values():
            gate.context.take_news()

    def status_changed(self, status: Status) -> None:
        """An engine's."""
        self._front.metrics.status_changed(status)
        for gate in self.gates.values():
            gate.changed()

    def changed(self) -> None:
        """The server's phase."""
        for gate in self.gates.values():
            gate.changed()
