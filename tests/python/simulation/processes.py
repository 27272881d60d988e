"""The processes of a server as tasks of one event loop: the product's own parts, killed and started again at will."""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast
from unittest.mock import patch

import msgspec
import zmq

from engine_harness import EngineParts
from fake_executor import FakeExecutor
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.client.open_counts import OpenCounts
from hybrid_serve.config import CacheConfig, Config, SchedulerConfig, ServerConfig
from hybrid_serve.engine.inbox import IDLE_MS
from hybrid_serve.shared_memory import OPEN_SLOT_BYTES
from hybrid_serve.sockets import bind_router
from hybrid_serve.wire import Empty, Kind, Status, engine_identity, pack

from .network import Network, SimContext
from .virtual_time import VirtualClock

CONTROL = "ipc://control"


def data_address(index: int) -> str:
    return f"ipc://engine-{index}"


def context_of(network: Network) -> zmq.Context[Any]:
    return cast("zmq.Context[Any]", SimContext(network))


class _Poller(zmq.Poller):
    """Says at once that nothing is there, and remembers that somebody would have waited."""

    would_wait = False

    def poll(self, timeout: float | None = None) -> list[tuple[Any, int]]:
        self.would_wait = True
        return []


class SimEngine:
    """An engine process. Knows who it is and how fast, not what befalls it."""

    def __init__(
        self,
        network: Network,
        clock: VirtualClock,
        rng: random.Random,
        index: int,
        num_clients: int,
        num_blocks: int,
    ) -> None:
        self._rng = rng
        self.context, self._poller = context_of(network), _Poller()
        executor = FakeExecutor(num_blocks, depth=rng.choice((1, 2)), num_host_blocks=rng.choice((0, 0, 16)))
        config = Config(cache=CacheConfig(), scheduler=SchedulerConfig())
        self.parts = EngineParts(
            self.context,
            config,
            executor,
            data_address(index),
            CONTROL,
            num_clients,
            clock=clock,
            poller=self._poller,
            index=index,
        )
        self.step_seconds = rng.choice((0.001, 0.01, 0.03))
        self._arrived = asyncio.Event()
        for socket in (self.parts.peers.socket, self.parts.inbox.control):
            asyncio.get_running_loop().add_reader(socket, self._arrived.set)
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        for _ in self.parts.loop.turns():
            if not self._poller.would_wait:
                slow = self._rng.random() < 0.003
                await asyncio.sleep(self._rng.random() * (2.0 if slow else self.step_seconds))
                continue
            self._poller.would_wait = False
            inbox = self.parts.inbox
            if not any(socket.getsockopt(zmq.EVENTS) for socket in (inbox.peers.socket, inbox.control)):
                self._arrived.clear()
                await _within(self._arrived, IDLE_MS / 1000)
            await asyncio.sleep(0)
        self.context.destroy()

    def kill(self) -> None:
        self.task.cancel()
        self.context.destroy()

    @property
    def faults(self) -> list[str]:
        """What is not as it must be when nobody wants anything any more."""
        parts, found = self.parts, []
        stats = parts.core.stats()
        if not parts.core.idle or stats.num_running or stats.num_waiting:
            found.append(f"runs {stats.num_running} and holds {stats.num_waiting} requests that nobody waits for")
        if stats.blocks_used or stats.host_blocks_used:
            found.append(f"has {stats.blocks_used} blocks and {stats.host_blocks_used} of the host that nobody uses")
        if any(parts.peers.live):
            found.append(f"believes that {parts.peers.live} run")
        if parts.probation.num_held or parts.probation.is_busy:
            found.append("has requests on trial that have ended")
        if self.task.done():
            found.append(f"ended: {self.task.exception()!r}")
        return found


async def _within(event: asyncio.Event, seconds: float) -> None:
    """Until then at the latest."""
    handle = asyncio.get_running_loop().call_later(seconds, event.set)
    await event.wait()
    handle.cancel()


class SimSupervisor:
    """Starts engines again, and tells API servers as ``launch`` does. Its own sockets are those of one machine."""

    def __init__(self, network: Network, clock: VirtualClock, rng: random.Random, engines: int, clients: int) -> None:
        self._network, self._clock, self._rng, self._num_clients = network, clock, rng, clients
        self._socket = bind_router(context_of(network), CONTROL)
        asyncio.get_running_loop().add_reader(self._socket, self._take)
        # The same in every engine: what has filled one is refused by a smaller one.
        self._num_blocks = rng.choice((8, 12, 24, 64))
        self._known: set[bytes] = set()
        self.engines: list[SimEngine | None] = [None] * engines
        self.statuses = [Status("starting", engine=index) for index in range(engines)]
        self.num_deaths = 0
        for index in range(engines):
            self.start(index)

    def _take(self) -> None:
        while self._socket.getsockopt(zmq.EVENTS):
            identity, *frames = self._socket.recv_multipart()
            if frames[0] == Kind.HELLO:
                self._known.add(identity)
                for status in self.statuses:
                    self._tell(identity, status)

    def _tell(self, identity: bytes, status: Status) -> None:
        try:
            self._socket.send_multipart([identity, *pack(Kind.STATUS, status)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise

    def _say(self, status: Status) -> None:
        self.statuses[status.engine] = msgspec.structs.replace(status, suspects=b"", culprits=b"")
        for identity in sorted(self._known):
            self._tell(identity, status)

    def start(self, index: int) -> None:
        engine = self.engines[index] = SimEngine(
            self._network, self._clock, self._rng, index, self._num_clients, self._num_blocks
        )
        restarts = self.statuses[index].restarts
        self._say(Status("ready", 1.0, facts=engine.parts.facts, restarts=restarts, engine=index))

    async def kill(self, index: int) -> None:
        """And starts it again, a while later, unless another one lives and it has died too often."""
        engine, rng = self.engines[index], self._rng
        if engine is None:
            return
        self.num_deaths += 1
        self.engines[index] = None
        engine.kill()
        await asyncio.sleep(rng.choice((0.0, 0.01, 0.3)))
        old, heartbeat = self.statuses[index], engine.parts.heartbeat
        is_left_out = any(self.engines) and rng.random() < 0.2
        self._say(
            Status(
                "dead" if is_left_out else "restarting",
                facts=old.facts,
                restarts=old.restarts + 1,
                suspects=heartbeat.running,
                culprits=heartbeat.culprits,
                engine=index,
            )
        )
        if not is_left_out:
            await asyncio.sleep(rng.choice((0.0, 0.001, 1.0)))
            self.start(index)

    def stop(self) -> None:
        for index, engine in enumerate(self.engines):
            if engine is not None:
                self._socket.send_multipart([engine_identity(index), *pack(Kind.SHUTDOWN, Empty())])


class SimApiServer:
    """An API server's client process."""

    def __init__(self, network: Network, index: int, launch: int, num_engines: int, open_memory: memoryview) -> None:
        """``open_memory``: of the ``OpenCounts`` of all of them."""
        self.context = context_of(network)
        self.index = index
        config = Config(server=ServerConfig(api_server_count=len(open_memory) // OPEN_SLOT_BYTES))
        addresses = [(engine, data_address(engine)) for engine in range(num_engines)]
        open_counts = OpenCounts(open_memory, index)
        open_counts.clear()
        self.client = ZmqEngineClient(config, index, CONTROL, addresses, launch=launch, open_counts=open_counts)
        with patch("hybrid_serve.client.dealers.zmq.Context", lambda: self.context):
            self.client.start()
        self.tasks: set[asyncio.Task[None]] = set()
        self.is_dead = False

    def kill(self) -> None:
        """What its tasks still do reaches nobody."""
        self.is_dead = True
        self.context.destroy()
        for task in self.tasks:
            task.cancel()
        self.client.close()

    @property
    def faults(self) -> list[str]:
        group = self.client.group
        found = [f"waits for {len(link.streams)} choices" for link in group.links if link.streams]
        if group._link_of:
            found.append(f"has {len(group._link_of)} requests that have ended")
        return found
