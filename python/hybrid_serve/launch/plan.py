"""Which processes a configuration means. Starts nothing and imports nothing of theirs: entry points are strings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..config import Config
from ..sockets import tcp_address
from ..wire import identity_of

ENGINE_ENTRY = "hybrid_serve.engine.process:main"
API_ENTRY = "hybrid_serve.server.process:main"
RAY_ENTRY = "hybrid_serve.launch.ray:main"
LOAD = "hybrid_serve.engine.backends:load"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One child. Its entry point is called as ``entry(config, **arguments)``; all of it crosses as JSON."""

    # "engine", "api"; "model" keeps the engines of one of several; "ray" starts engines elsewhere, "node" is one there
    role: str
    index: int
    entry: str  # "module:function"
    arguments: dict[str, Any]
    environment: dict[str, str] = {}  # on top of the parent's
    inherited_fds: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def is_in_lockstep(self) -> bool:
        """When it ends, the others of its role cannot go on either."""
        return "lockstep_addresses" in self.arguments

    @property
    def identity(self) -> bytes:
        return identity_of(self.role, self.index)


class Front(NamedTuple):
    """What API servers inherit."""

    listen_fd: int  # the bound socket
    shared_fd: int  # see shared_memory.make


class Joined(NamedTuple):
    """What engines without API servers of their own are told by whom they are for."""

    host: str  # the address of this machine that the head can reach; empty: it is this machine's
    num_api_servers: int


def plan(
    config: Config,
    directory: Path,
    place: Front | Joined,
    heartbeat_fds: Sequence[int],
    *,
    load: str = LOAD,
    api_entry: str = API_ENTRY,
    lockstep: bool = False,
    num_cores: int = 0,
) -> list[ProcessSpec]:
    """The children of one server, the slowest to start first: engines, and where this is the ``place`` for them API
    servers. ``directory``: of this run, for their sockets; ``heartbeat_fds``: see ``heartbeat.make``, one for each
    engine. ``load``: what the engine computes with, an ``engine.executor.Load``; ``lockstep``: its replicas must step
    together; ``num_cores``: that each engine may use, 0: an equal share of those that there are."""
    control, parallel = control_address(directory), config.parallel
    ranks, is_away = parallel.local_ranks, isinstance(place, Joined) and bool(place.host)
    addresses = {rank: data_address(directory, rank) for rank in ranks}
    num_clients = config.server.api_server_count
    if isinstance(place, Joined):
        num_clients = place.num_api_servers
        if place.host:
            addresses = dict.fromkeys(ranks, tcp_address(place.host, "*"))
    engines = [
        ProcessSpec(
            role="engine",
            index=index,
            entry=ENGINE_ENTRY,
            arguments={
                "index": index,
                "num_clients": num_clients,
                "control_address": control,
                "data_address": addresses[index],
                "key_file": parallel.data_parallel_key_file if is_away else "",
                "load": load,
                "heartbeat_fd": heartbeat_fd,
                "stacks_path": str(stacks_path(directory, index)),
                "cpu_threads": num_cores or threads_of_each(config, len(addresses), usable_cores()),
            }
            | (lockstep_arguments(directory, ranks, index) if lockstep else {}),
            environment=device_of(index - ranks[0], len(ranks), os.environ),
            inherited_fds=(heartbeat_fd,),
        )
        for index, heartbeat_fd in zip(ranks, heartbeat_fds, strict=True)
    ]
    if isinstance(place, Joined):
        return engines
    addresses |= dict.fromkeys(parallel.remote_ranks, "")  # their status will bring it
    starters = []
    if parallel.is_ray:
        environment = {} if parallel.insecure_ray else {"RAY_AUTH_MODE": "token"}
        arguments = {"control_address": control, "load": load}
        starters = [ProcessSpec(role="ray", index=0, entry=RAY_ENTRY, arguments=arguments, environment=environment)]
    listed = {"data_addresses": [[rank, address] for rank, address in sorted(addresses.items())]}
    return [*engines, *starters, *api_servers(config, directory, place, listed, api_entry)]


def api_servers(
    config: Config, directory: Path, front: Front, arguments: dict[str, Any], entry: str = API_ENTRY
) -> list[ProcessSpec]:
    """``arguments``: which engines there are."""
    return [
        ProcessSpec(
            role="api",
            index=index,
            entry=entry,
            arguments={
                "api_index": index,
                **front._asdict(),
                "control_address": control_address(directory),
                **arguments,
                "launch": 0,
            },
            inherited_fds=(*front,),
        )
        for index in range(config.server.api_server_count)
    ]


def lockstep_arguments(directory: Path, ranks: range, index: int) -> dict[str, Any]:
    addresses = [f"ipc://{directory}/lockstep-{rank}" for rank in ranks]
    return {"lockstep_addresses": addresses, "lockstep_place": ranks.index(index)}


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


def data_address(directory: Path, index: int) -> str:
    """Of an engine of this machine."""
    return f"ipc://{directory}/engine-{index}"


def control_address(directory: Path) -> str:
    return f"ipc://{directory}/control"
