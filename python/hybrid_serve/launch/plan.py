"""Which processes a configuration means. Starts nothing and imports nothing of theirs: entry points are strings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..config import Config

ENGINE_ENTRY = "hybrid_serve.engine.process:main"
API_ENTRY = "hybrid_serve.server.process:main"
LOAD_INLINE = "hybrid_serve.engine.executor:load_inline"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


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
    heartbeat_fds: Sequence[int],
    *,
    counts_fd: int,
    load: str = LOAD_INLINE,
    api_entry: str = API_ENTRY,
) -> list[ProcessSpec]:
    """The children of one server, the slowest to start first. ``directory``: of this run, for their sockets.
    ``listen_fd``: the bound socket; ``heartbeat_fds``: see ``heartbeat.make``, one for each engine; ``counts_fd``:
    memory of COUNTS_SLOT_BYTES for each API server.
    ``load``: what the engine computes with, an ``engine.executor.Load``."""
    control = control_address(directory)
    addresses = [(index, f"ipc://{directory}/engine-{index}") for index in range(len(heartbeat_fds))]
    engines = [
        ProcessSpec(
            role="engine",
            index=index,
            entry=ENGINE_ENTRY,
            arguments={
                "index": index,
                "num_clients": config.server.api_server_count,
                "control_address": control,
                "data_address": address,
                "load": load,
                "heartbeat_fd": heartbeat_fd,
                "stacks_path": str(stacks_path(directory, index)),
                "cpu_threads": threads_of_each(config, len(addresses), usable_cores()),
            },
            environment=device_of(place, len(addresses), os.environ),
            inherited_fds=(heartbeat_fd,),
        )
        for place, ((index, address), heartbeat_fd) in enumerate(zip(addresses, heartbeat_fds, strict=True))
    ]
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
                "data_addresses": [[index, address] for index, address in addresses],
                "launch": 0,
            },
            inherited_fds=(listen_fd, counts_fd),
        )
        for index in range(config.server.api_server_count)
    ]
    return [*engines, *servers]


def again(spec: ProcessSpec) -> ProcessSpec:
    """For the process that takes the place of one that died."""
    if "launch" not in spec.arguments:
        return spec
    return msgspec.structs.replace(spec, arguments=spec.arguments | {"launch": spec.arguments["launch"] + 1})


def threads_of_each(config: Config, num_engines: int, num_cores: int) -> int:
    """CPU threads of one of so many engines on a machine; 0: as many as it finds."""
    if config.engine.cpu_threads or num_engines == 1:
        return config.engine.cpu_threads
    return max(1, num_cores // num_engines)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(place: int, num_engines: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable by which the engine at that place among those of the machine sees the GPU at that place alone."""
    if num_engines == 1:
        return {}
    visible = [name.strip() for name in environment.get(VISIBLE_GPUS, "").split(",") if name.strip()]
    if visible and place >= len(visible):
        return {VISIBLE_GPUS: ""}  # there is none for it; the engine says so, or runs on the CPU if it may
    return {VISIBLE_GPUS: visible[place] if visible else str(place)}


def stacks_path(directory: Path, index: int) -> Path:
    """Where an engine that hangs writes its stacks."""
    return directory / f"engine-{index}.stacks"


def control_address(directory: Path) -> str:
    return f"ipc://{directory}/control"
