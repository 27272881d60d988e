"""Which processes a configuration means. Starts nothing and imports nothing of theirs: entry points are strings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ..config import Config

ENGINE_ENTRY = "hybrid_serve.engine.process:main"
API_ENTRY = "hybrid_serve.server.process:main"
LOAD_INLINE = "hybrid_serve.engine.executor:load_inline"


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One child. Its entry point is called as ``entry(config, **arguments)``; all of it crosses as JSON."""

    role: str  # "engine" or "api"
    index: int
    entry: str  # "module:function"
    arguments: dict[str, Any]
    environment: dict[str, str] = {}  # on top of the parent's
    inherited_fds: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"


def plan(
    config: Config,
    directory: Path,
    listen_fd: int,
    *,
    counts_fd: int,
    num_api_servers: int = 1,
    load: str = LOAD_INLINE,
    api_entry: str = API_ENTRY,
) -> list[ProcessSpec]:
    """The children of one server, the slowest to start first. ``directory``: of this run, for their sockets.
    ``listen_fd``: the bound socket; ``counts_fd``: memory of COUNTS_SLOT_BYTES for each API server.
    ``load``: what the engine computes with, an ``engine.executor.Load``."""
    control = control_address(directory)
    data = f"ipc://{directory}/engine-0"
    engine = ProcessSpec(
        role="engine",
        index=0,
        entry=ENGINE_ENTRY,
        arguments={
            "index": 0,
            "num_clients": num_api_servers,
            "control_address": control,
            "data_address": data,
            "load": load,
        },
    )
    servers = [
        ProcessSpec(
            role="api",
            index=index,
            entry=api_entry,
            arguments={
                "api_index": index,
                "listen_fd": listen_fd,
                "counts_fd": counts_fd,
                "control_address": control,
                "data_addresses": [data],
            },
            inherited_fds=(listen_fd, counts_fd),
        )
        for index in range(num_api_servers)
    ]
    return [engine, *servers]


def control_address(directory: Path) -> str:
    return f"ipc://{directory}/control"
