"""ModelsClient: one API server's sockets to the engines of several models, and to their supervisor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import Config
from ..served import ServedModel
from ..wire import ALL_ENGINES, Kind, ModelState, Order, Status, Use, api_identity, first_request_id
from . import EngineDead
from .control import Control
from .dealers import Dealers
from .group import EngineGroup
from .group_client import GroupClient
from .link import Link
from .open_counts import OpenCounts
from .router import Router


class ModelsClient:
    """``models`` has an EngineClient for each, by name; what it says as one is of all their engines together. Knows
    which engine is of which model; not which model a request is for.

    ``on_shutdown`` and ``on_status`` as of ``ZmqEngineClient``; ``on_model`` is called with every news of a model."""

    def __init__(
        self,
        config: Config,
        api_index: int,
        control_address: str,
        models: Sequence[ServedModel],
        open_counts: OpenCounts,
        *,
        launch: int = 0,
    ) -> None:
        self.on_shutdown: Callable[[bool], None] = lambda now: None
        self.on_status: Callable[[Status], None] = lambda status: None
        self.on_model: Callable[[ModelState], None] = lambda state: None
        self._dealers = Dealers(api_identity(api_index))
        first_id, self.models = first_request_id(api_index, launch), dict[str, GroupClient]()
        for model in models:
            parallel = model.config.parallel
            router = Router(parallel.data_parallel_prefix_affinity, api_index)
            addresses = [(index, "") for index in model.engines]
            group = EngineGroup(api_index, open_counts, addresses, self._dealers, router)
            self.models[model.name] = GroupClient(group, first_id)  # each engine knows requests of one model only
        self._of_engine = {link.index: client.group for client in self.models.values() for link in client.group.links}
        self._control = Control(config, api_index, control_address, self._dealers)
        self._control.on_status, self._control.on_shutdown = self._take_status, self._shut_down
        self._control.on_model = lambda state: self.on_model(state)
        self.is_dead = False

    @property
    def engines(self) -> list[Link]:
        return [link for client in self.models.values() for link in client.group.links]

    def say(self, use: Use) -> None:
        self._control.say(Kind.USE, use)

    def order(self, order: Order) -> None:
        self._control.say(Kind.ORDER, order)

    def start(self) -> None:
        """Call it inside the event loop."""
        self._dealers.start()
        self._control.start()
        for client in self.models.values():
            client.group.start()
        self._control.say_ready()  # requests wait for their model

    def close(self) -> None:
        """Streams that are still open fail."""
        for client in self.models.values():
            client.group.fail_all(EngineDead("the client was closed"))
        self._dealers.close()

    def _take_status(self, status: Status) -> None:
        self.is_dead = self.is_dead or (status.engine == ALL_ENGINES and status.phase == "dead")
        groups = [client.group for client in self.models.values()]
        for group in groups if status.engine == ALL_ENGINES else [self._of_engine[status.engine]]:
            group.take_status(status)
        self.on_status(status)

    def _shut_down(self, again: bool) -> None:
        self.on_shutdown(again or self.is_dead)
