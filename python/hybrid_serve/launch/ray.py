"""Engines on the nodes of a Ray cluster: Ray starts there what somebody would start with ``--headless``.

Two processes run what is here. One is a child of the supervisor, the only process of a server that has Ray in it: it
keeps an actor alive for each engine. The other is the actor's: it starts the engine as a child, with the key of this
run, and waits. The engine joins the head over TCP as any headless one does; no request goes through Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import zmq

from .. import __version__
from ..config import Config, ServerConfig
from ..curve import make_key_file
from ..errors import StartupError
from ..problems import is_loopback
from ..sockets import bind_router, connect_dealer, readable
from ..wire import PROTOCOL_VERSION, Hello, Kind, StartupFailure, Status, identity_of, pack, unpack
from .local import Order, death, start
from .plan import ProcessSpec, control_address
from .restarts import WINDOW, Restarts
from .run_directory import RunDirectory

log = logging.getLogger(__name__)
NODE_ENTRY = "hybrid_serve.launch.headless:main"
KEY_NAME = "key"
ENGINE_FAILED = 20
LOOK_SECONDS = 0.25  # between two looks at actors and at the supervisor
LAST_WORDS_MS = 300  # how long the report of an engine that ended may still be on its way
SLOW_PLACEMENT = 10.0  # seconds after which it is said that an engine has no node yet
PROBE_SECONDS = 30.0
_START = "RAY_AUTH_MODE=token ray start --head here, ray start --address ... on other machines, or RAY_ADDRESS"


def prepared(config: Config, directory: Path) -> Config:
    """The configuration of a head whose engines Ray will start, with a key for this run alone where none is given.
    Raises StartupError without Ray."""
    if find_spec("ray") is None:
        fix = "pip install 'hybrid-serve[ray]', on every node"
        raise _unusable("the package ray is not installed", fix)
    parallel, model = config.parallel, config.model
    if not parallel.data_parallel_key_file:
        make_key_file(directory / KEY_NAME)
        parallel = replace(parallel, data_parallel_key_file=str(directory / KEY_NAME))
    if Path(model.model).exists():  # a worker of Ray's may have another current folder
        names = model.served_model_name or (model.model,)
        model = replace(model, model=str(Path(model.model).absolute()), served_model_name=names)
    return replace(config, model=model, parallel=parallel)


def main(config: Config, *, control_address: str, load: str) -> None:
    """The supervisor's child. Returns when that says stop; the actors end with this process, however it ends."""
    context = zmq.Context()
    try:
        control = connect_dealer(context, control_address, identity_of("ray", 0))
        hello = Hello("ray", 0, os.getpid(), PROTOCOL_VERSION, __version__, config.digest())
        control.send_multipart(pack(Kind.HELLO, hello))
        ray = _connected(config)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        Actors(ray, config, needs(config, nodes), load, control).run()
    finally:
        context.destroy(linger=0)


def needs(config: Config, nodes: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """What Ray must find on a node for each engine: a GPU, or where engines run on CPUs the largest equal share with
    which all find room. ``nodes``: what each has. Raises StartupError if they do not."""
    count, device = config.parallel.data_parallel_size, config.engine.device
    gpus, cpus = ([int(node.get(name, 0)) for node in nodes] for name in ("GPU", "CPU"))
    if device == "cuda" or (device == "auto" and sum(gpus) > 0):
        if sum(gpus) >= count:
            return {"num_gpus": 1, "num_cpus": 0}
        why, fix = f"its nodes have {sum(gpus)} GPUs", f"--data-parallel-size {sum(gpus)}, or --device cpu"
        raise StartupError("HS-E047", f"the Ray cluster has no room for {count} engines", why, fix)
    shares = [config.engine.cpu_threads] if config.engine.cpu_threads else range(max(cpus, default=0), 0, -1)
    for share in shares:
        if sum(num_cpus // share for num_cpus in cpus) >= count:
            return {"num_cpus": share}
    why, fix = f"its nodes have {cpus} CPUs", "a smaller --data-parallel-size or --cpu-threads, or more nodes"
    raise StartupError("HS-E047", f"the Ray cluster has no room for {count} engines", why, fix)


def _connected(config: Config) -> Any:
    """Ray, in the cluster of RAY_ADDRESS or of this machine. Raises StartupError for one that cannot be used."""
    if _is_open() and not config.parallel.insecure_ray:
        why = "it lets in whoever can reach it, without a token, and runs what he sends"
        raise _unusable(why, "start its nodes with RAY_AUTH_MODE=token, or --insecure-ray")
    import ray

    try:
        address = os.environ.get("RAY_ADDRESS") or "auto"
        ray.init(address, configure_logging=False, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # of many classes; the cluster did answer a moment ago
        raise _unusable(_line(str(error), 0), "the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token") from error
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray took it; the supervisor alone decides when a child ends
    host, here = config.parallel.data_parallel_address, ray.util.get_node_ip_address()
    others = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]} - {here}
    if is_loopback(host) and others:
        why = f"it has nodes on other machines, such as {min(others)}, where {host} is not this one"
        raise _unusable(why, f"--data-parallel-address {here}")
    return ray


def _is_open() -> bool:
    """Whether the cluster answers somebody who has no token. Raises StartupError if there is none that answers."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "health-check"],  # what Kubernetes asks a cluster, too
            env=environment | {"RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise _unusable(f"it did not answer within {PROBE_SECONDS:g} s", _START) from None
    if done.returncode and "AuthenticationError" not in done.stderr:
        raise _unusable(_line(done.stderr or done.stdout, -1), _START)
    return done.returncode == 0


def _unusable(why: str, fix: str) -> StartupError:
    return StartupError("HS-E047", "the Ray cluster cannot be used", why, fix)


class Actors:
    """An actor for each rank, started again when it is lost, a limited number of times. Knows ranks and ends; neither
    what an engine does nor which node has it, which is Ray's choice."""

    def __init__(
        self, ray: Any, config: Config, resources: Mapping[str, int], load: str, control: zmq.Socket[bytes]
    ) -> None:
        self._ray, self._config, self._load, self._control = ray, config, load, control
        # SPREAD: a machine that is lost takes as few engines with it as possible.
        self._class = ray.remote(NodeActor).options(max_restarts=0, scheduling_strategy="SPREAD", **resources)
        self._num_cores = resources["num_cpus"]
        self._keys = Path(config.parallel.data_parallel_key_file).read_bytes()
        ranks = config.parallel.remote_ranks
        self._restarts = {rank: Restarts(config.supervision) for rank in ranks}
        self._due = dict.fromkeys(ranks, 0.0)  # when it is to be started
        self._running: dict[Any, tuple[int, Any]] = {}  # by reference to how it will have ended: rank, actor
        self._places: dict[Any, tuple[int, float]] = {}  # by reference to where it is: rank, since when it is asked

    def run(self) -> None:
        news: list[Any] = []
        while not self._is_told_to_end():  # asked before an end is taken for a loss: engines are told, too
            for reference in news:
                if reference in self._places:
                    self._placed(reference)
                else:
                    self._ended(reference)
            now = time.monotonic()
            for rank in [rank for rank, when in self._due.items() if when <= now]:
                del self._due[rank]
                self._start(rank)
            self._complain()
            references = [*self._places, *self._running]
            if references:
                news = self._ray.wait(references, timeout=LOOK_SECONDS)[0]
            else:
                news = []
                time.sleep(LOOK_SECONDS)

    def _start(self, rank: int) -> None:
        actor = self._class.remote()
        order = Order(node_config(self._config, rank), node_spec(rank, self._load, self._num_cores), "")
        self._places[actor.place.remote()] = rank, time.monotonic()
        self._running[actor.run.remote(msgspec.json.encode(order), self._keys)] = rank, actor

    def _placed(self, reference: Any) -> None:
        rank, _ = self._places.pop(reference)
        try:
            log.info("engine %d is started on node %s", rank, self._ray.get(reference))
        except self._ray.exceptions.RayError:
            log.debug("engine %d was lost before it had a node", rank)  # its end says why

    def _complain(self) -> None:
        now = time.monotonic()
        for reference, (rank, since) in self._places.items():
            if now - since > SLOW_PLACEMENT:
                log.warning("engine %d waits until a node of the Ray cluster has room for it", rank)
                self._places[reference] = rank, now + 5 * SLOW_PLACEMENT

    def _ended(self, reference: Any) -> None:
        rank, actor = self._running.pop(reference)
        try:
            failure = unpack(self._ray.get(reference), StartupFailure)
        except self._ray.exceptions.RayError as error:
            fix = "ray status shows the nodes; ray logs has the actor's log"
            failure = StartupFailure(
                "HS-E202", f"the actor of engine {rank} is lost", _line(str(error), 0), fix, ENGINE_FAILED
            )
        self._ray.kill(actor)  # it may only be out of reach
        self._control.send_multipart(pack(Kind.FAILED, failure))
        now, restarts = time.monotonic(), self._restarts[rank]
        pause = restarts.next_pause(now)
        if pause is None:
            why = f"{failure.what}, after {restarts.recent} restarts within {WINDOW:g} s: {failure.why}"
            log.error("%s; it is left out", why)
            self._control.send_multipart(pack(Kind.STATUS, Status("dead", message=why, engine=rank)))
            return
        when = f"in {pause:g} s" if pause else "now"
        log.error("%s: %s; engine %d is started again %s", failure.what, failure.why, rank, when)
        self._due[rank] = now + pause

    def _is_told_to_end(self) -> bool:
        return readable(self._control) and self._control.recv_multipart()[0] == Kind.SHUTDOWN


def node_config(config: Config, rank: int) -> Config:
    """For the headless engine of that rank: what engines need to know, and no key of a client."""
    server, executor = config.server, config.parallel.distributed_executor_backend
    return replace(
        config,
        server=ServerConfig(log_level=server.log_level, log_format=server.log_format),
        parallel=replace(
            config.parallel,
            data_parallel_backend="mp",
            distributed_executor_backend="uni" if executor == "ray" else executor,
            headless=True,
            data_parallel_start_rank=rank,
            data_parallel_size_local=1,
        ),
    )


def node_spec(rank: int, load: str, num_cores: int) -> ProcessSpec:
    return ProcessSpec(role="node", index=rank, entry=NODE_ENTRY, arguments={"load": load, "num_cores": num_cores})


class NodeActor:
    """Starts a headless engine on the node where it is, and waits. The engine watches a socket to it and is never left
    behind. Knows no rank but its order's."""

    def place(self) -> str:
        import ray

        return str(ray.util.get_node_ip_address())

    def run(self, order: bytes, keys: bytes) -> bytes:
        """``order``: a ``local.Order`` without the key file and the addresses of this machine, as JSON; ``keys``: the
        key file. The StartupFailure with which the engine ended."""
        told = msgspec.json.decode(order, type=Order)
        if not told.spec.arguments["num_cores"]:
            os.environ.pop("OMP_NUM_THREADS", None)  # Ray's 1 for an actor without CPUs of its own
        with RunDirectory() as directory, zmq.Context() as context:
            key_file, control = directory / KEY_NAME, control_address(directory)
            key_file.touch(mode=0o600)
            key_file.write_bytes(keys)
            parallel = replace(told.config.parallel, data_parallel_key_file=str(key_file))
            arguments = told.spec.arguments | {"control_address": control}
            with bind_router(context, control) as reports:
                child = start(
                    msgspec.structs.replace(told.spec, arguments=arguments),
                    replace(told.config, parallel=parallel),
                    str(directory),
                )
                while child.life.recv(1):
                    pass
                code = child.reap()
                if code and reports.poll(LAST_WORDS_MS):
                    return reports.recv_multipart()[2]
                return pack(Kind.FAILED, death(child, code, ENGINE_FAILED))[1]  # type: ignore[no-any-return]


def _line(text: str, number: int) -> str:
    """One of the lines that have something on them."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it did not say why"]
    return lines[number][:200]
