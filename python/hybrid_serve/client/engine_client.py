"""ZmqEngineClient: one API server's sockets to the engines and to the supervisor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from ..config import Config
from ..curve import read_key_file
from ..wire import (
    PROTOCOL_VERSION,
    AddRequest,
    EngineFacts,
    Hello,
    Kind,
    Limit,
    SamplingParams,
    Status,
    api_identity,
    first_request_id,
    pack,
    unpack,
)
from . import EngineDead
from .dealers import Dealers
from .group import EngineGroup
from .link import Link
from .router import Router
from .streams import ZmqStream


class ZmqEngineClient:
    """Numbers requests, gives them to the engines, and passes on what the supervisor says.

    Knows ids and the supervisor; not text, not HTTP, not which engine has what. All of it runs in the event loop that
    ``start`` was called in. ``on_shutdown(now)`` is called with False when running requests are to be finished and no
    more taken, and with True when they are to be ended at once; ``on_status`` with every news of an engine's phase;
    ``on_replay``: see ``EngineGroup``.
    """

    def __init__(
        self,
        config: Config,
        api_index: int,
        control_address: str,
        data_addresses: Sequence[tuple[int, str]],
        *,
        launch: int = 0,
        on_shutdown: Callable[[bool], None] | None = None,
        on_status: Callable[[Status], None] | None = None,
    ) -> None:
        """``data_addresses``: (index, address) of each engine, no address for one whose status will bring it;
        ``launch``: how many API servers of this index ran before. Raises StartupError for a bad key file."""
        self.on_shutdown, self.on_status = on_shutdown, on_status
        self._config, self._index = config, api_index
        self._control_address = control_address
        self._num_shutdowns = 0
        self._next_id = first_request_id(api_index, launch)
        parallel = config.parallel
        keys = read_key_file(Path(parallel.data_parallel_key_file)) if parallel.remote_ranks else None
        self._dealers = Dealers(api_identity(api_index), keys)
        router = Router(parallel.data_parallel_prefix_affinity, api_index)
        count = config.server.api_server_count
        self.group = EngineGroup(api_index, count, data_addresses, self._dealers, router)

    # EngineClient

    @property
    def engines(self) -> Sequence[Link]:
        return self.group.links

    @property
    def status(self) -> Status:
        return self.group.status

    @property
    def facts(self) -> EngineFacts | None:
        return self.group.facts

    def generate(
        self,
        token_ids: bytes,
        params: SamplingParams,
        *,
        n: int = 1,
        priority: int = 0,
        eos_token_ids: tuple[int, ...] = (),
        cache_salt: bytes = b"",
        rank: int | None = None,
    ) -> ZmqStream:
        """See EngineClient. The request is sent when the block is entered."""
        if params.seed is None:
            raise ValueError("params.seed is not set")
        first_id = self._next_id
        self._next_id += n
        request = AddRequest(first_id, n, priority, params, eos_token_ids, cache_salt)
        return ZmqStream(request, token_ids, lambda stream: self.group.begin(stream, rank), self.group.abort)

    def limit(self, max_num_queued_reqs: int, max_num_seqs: int) -> None:
        self.group.limit(Limit(max_num_queued_reqs, max_num_seqs))

    # Its life

    def start(self) -> None:
        """Connects; says HELLO and JOIN. Both ends may still be starting. Call it inside the event loop."""
        self._dealers.start()
        control = self._dealers.open(self._control_address, self._take_control)
        hello = Hello("api", self._index, os.getpid(), PROTOCOL_VERSION, __version__, self._config.digest())
        self._dealers.send(control, pack(Kind.HELLO, hello))
        self.group.start()

    def close(self) -> None:
        """Streams that are still open fail."""
        self.group.fail_all(EngineDead("the client was closed"))
        self._dealers.close()

    def _take_control(self, frames: list[bytes]) -> None:
        kind = frames[0]
        if kind == Kind.STATUS:
            status = unpack(frames[1], Status)
            self.group.take_status(status)
            if self.on_status is not None:
                self.on_status(status)
        elif kind == Kind.SHUTDOWN:
            self._num_shutdowns += 1
            if self.on_shutdown is not None:
                self.on_shutdown(self._num_shutdowns > 1 or self.status.phase == "dead")
        else:
            raise ValueError(f"unknown kind {kind!r}")
