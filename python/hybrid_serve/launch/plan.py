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
    heartbeat_fd: int,
    *,
    counts_fd: int,
    load: str = LOAD_INLINE,
    api_entry: str = API_ENTRY,
) -> list[ProcessSpec]:
    """The children of one server, the slowest to start first. ``directory``: of this run, for their sockets.
    ``listen_fd``: the bound socket; ``heartbeat_fd``: see ``heartbeat.make``; ``counts_fd``: memory of
    COUNTS_SLOT_BYTES for each API server.
    ``load``: what the engine computes with, an ``engine.executor.Load``."""
    control = control_address(directory)
    data = f"ipc://{directory}/engine-0"
    engine = ProcessSpec(
        role="engine",
        index=0,
        entry=ENGINE_ENTRY,
        arguments={
            "index": 0,
            "num_clients": config.server.api_server_count,
            "control_address": control,
            "data_address": data,
            "load": load,
            "heartbeat_fd": heartbeat_fd,
            "stacks_path": str(stacks_path(directory)),
        },
        inherited_fds=(heartbeat_fd,),
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
                "launch": 0,
            },
            inherited_fds=(listen_fd, counts_fd),
        )
        for index in range(config.server.api_server_count)
    ]
    return [engine, *servers]


def again(spec: ProcessSpec) -> ProcessSpec:
    """For the process that takes the place of one that died."""
    if "launch" not in spec.arguments:
        return spec
    return msgspec.structs.replace(spec, arguments=spec.arguments | {"launch": spec.arguments["launch"] + 1})


def stacks_path(directory: Path) -> Path:
    """Where an engine that hangs writes its stacks."""
    return directory / "engine-0.stacks"


def control_address(directory: Path) -> str:
    return f"ipc://{directory}/control"
