"""ZmqEngineClient: one API server's sockets to the engines of a server's only model, and to the supervisor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import Config
from ..curve import read_key_file
from ..wire import Status, api_identity, first_request_id
from . import EngineDead
from .control import Control
from .dealers import Dealers
from .group import EngineGroup
from .group_client import GroupClient
from .open_counts import OpenCounts
from .router import Router


class ZmqEngineClient(GroupClient):
    """One model's engines as the supervisor tells of them.

    All of it runs in the event loop that ``start`` was called in. ``on_shutdown(now)`` is called with False when
    running requests are to be finished and no more taken, and with True when they are to be ended at once;
    ``on_status`` with every news of an engine's phase; ``on_refused`` with the strangers at the port for headless
    engines; ``group.on_replay``: see ``EngineGroup``.
    """

    def __init__(
        self,
        config: Config,
        api_index: int,
        control_address: str,
        data_addresses: Sequence[tuple[int, str]],
        *,
        launch: int = 0,
        open_counts: OpenCounts | None = None,
        on_shutdown: Callable[[bool], None] | None = None,
        on_status: Callable[[Status], None] | None = None,
    ) -> None:
        """``data_addresses``: (index, address) of each engine, no address for one whose status will bring it;
        ``launch``: how many API servers of this index ran before; ``open_counts``: where there are others. Raises
        StartupError for a bad key file."""
        self.on_shutdown, self.on_status = on_shutdown, on_status
        self.on_refused: Callable[[int], None] | None = None
        parallel = config.parallel
        keys = read_key_file(Path(parallel.data_parallel_key_file)) if parallel.remote_ranks else None
        self._dealers = Dealers(api_identity(api_index), keys)
        router = Router(parallel.data_parallel_prefix_affinity, api_index)
        group = EngineGroup(api_index, open_counts or OpenCounts(), data_addresses, self._dealers, router)
        super().__init__(group, first_request_id(api_index, launch))
        self._control = Control(config, api_index, control_address, self._dealers)
        self._control.on_status, self._control.on_shutdown = self._take_status, self._shut_down
        self._control.on_refused = self._take_refused

    def start(self) -> None:
        """Connects; says HELLO and JOIN. Both ends may still be starting. Call it inside the event loop."""
        self._dealers.start()
        self._control.start()
        self.group.start()

    def say_ready(self) -> None:
        """That this API server takes requests, to whoever waits for it."""
        self._control.say_ready()

    def close(self) -> None:
        """Streams that are still open fail."""
        self.group.fail_all(EngineDead("the client was closed"))
        self._dealers.close()

    def _take_status(self, status: Status) -> None:
        self.group.take_status(status)
        if self.on_status is not None:
            self.on_status(status)

    def _take_refused(self, num: int) -> None:
        if self.on_refused is not None:
            self.on_refused(num)

    def _shut_down(self, again: bool) -> None:
        if self.on_shutdown is not None:
            self.on_shutdown(again or self.status.phase == "dead")
