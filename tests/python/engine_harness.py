"""A real engine loop in a thread and a real client in an event loop, over real sockets, without processes."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import zmq

from fake_executor import FakeExecutor
from hybrid_serve.client import ChoiceOutput
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.config import CacheConfig, Config, SchedulerConfig
from hybrid_serve.engine.gaps import Gaps
from hybrid_serve.engine.inbox import Inbox
from hybrid_serve.engine.loop import EngineLoop
from hybrid_serve.engine.outbox import Around, Outbox
from hybrid_serve.engine.peers import Peers
from hybrid_serve.engine.phases import Phases
from hybrid_serve.engine.probation import Probation
from hybrid_serve.engine.process import engine_facts, make_core
from hybrid_serve.engine.watched import WatchedExecutor
from hybrid_serve.heartbeat import Heartbeat, make, max_watched_ids
from hybrid_serve.sockets import bind_router, connect_dealer
from hybrid_serve.wire import Empty, Kind, SamplingParams, Status, api_identity, engine_identity, pack

PATIENCE = 10.0  # seconds until a test gives up


class EngineParts:
    """All of an engine process but the process: what ``engine.process.main`` puts together, around a fake model."""

    def __init__(
        self,
        context: zmq.Context[Any],
        config: Config,
        executor: FakeExecutor,
        data_address: str,
        control_address: str,
        num_clients: int,
        *,
        clock: Any = time,
        poller: zmq.Poller | None = None,
        index: int = 0,
    ) -> None:
        """``clock``: as the module ``time``."""
        facts = executor.allocate()
        self.facts = engine_facts(config, facts)
        self.core = make_core(config, executor, facts, num_clients)
        self.peers = Peers(bind_router(context, data_address), num_clients)
        num_ids = max_watched_ids(config)
        heartbeat_fd = make(num_ids)
        self.heartbeat = Heartbeat(heartbeat_fd, num_ids, clock.monotonic_ns)
        os.close(heartbeat_fd)
        self.probation = Probation(self.heartbeat.try_out)
        self.inbox = Inbox(
            self.peers,
            connect_dealer(context, control_address, engine_identity(index)),
            self.heartbeat,
            self.probation,
            longest_prompt=facts.max_model_len - 1,
            max_num_seqs=config.scheduler.max_num_seqs or facts.max_num_seqs,
            max_num_queued_reqs=config.scheduler.max_num_queued_reqs,
            poller=poller,
        )

        def around() -> Around:
            return Around(self.inbox.may_run, self.inbox.num_dropped, 0)

        watched = WatchedExecutor(executor, self.core, self.heartbeat)
        watched.gaps = Gaps(clock.perf_counter_ns)
        phases = Phases(clock.perf_counter_ns)
        outbox = Outbox(self.peers, self.probation, watched.gaps, phases, around, clock.monotonic)
        self.loop = EngineLoop(self.core, watched, self.inbox, outbox, phases)


class EngineThread:
    """The engine of a server, and the supervisor's socket, without processes."""

    def __init__(
        self,
        directory: Path,
        executor: FakeExecutor | None = None,
        *,
        num_clients: int = 1,
        scheduler: SchedulerConfig | None = None,
    ) -> None:
        self.executor = executor or FakeExecutor()
        self.config = Config(cache=CacheConfig(), scheduler=scheduler or SchedulerConfig())
        self.control_address, self.data_address = f"ipc://{directory}/control", f"ipc://{directory}/engine-0"
        self.context = zmq.Context()
        self.control = bind_router(self.context, self.control_address)
        parts = EngineParts(
            self.context, self.config, self.executor, self.data_address, self.control_address, num_clients
        )
        self.facts, self.core, self.peers = parts.facts, parts.core, parts.peers
        self.heartbeat, self.inbox, self.loop = parts.heartbeat, parts.inbox, parts.loop
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> EngineThread:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.send_control(engine_identity(0), pack(Kind.SHUTDOWN, Empty()))
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.context.destroy(linger=0)
        if self.error is not None:
            raise self.error
        self.core.check_invariants()

    def send_control(self, identity: bytes, message: list[bytes]) -> None:
        wait_until(lambda: self._sent([identity, *message]), f"no {identity!r} at the control socket")

    def _sent(self, frames: list[bytes]) -> bool:
        try:
            self.control.send_multipart(frames)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    @asynccontextmanager
    async def client(self, index: int = 0) -> AsyncIterator[ZmqEngineClient]:
        """Connected, joined, told that the engine is ready."""
        client = ZmqEngineClient(self.config, index, self.control_address, [(0, self.data_address)])
        client.start()
        try:
            await until(lambda: self.peers._sessions[index] is not None)
            self.send_control(api_identity(index), pack(Kind.STATUS, Status("ready", facts=self.facts)))
            await until(lambda: client.facts is not None)
            yield client
        finally:
            client.close()


def wait_until(condition: Callable[[], bool], otherwise: str = "the condition did not come true") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.002)


async def until(condition: Callable[[], bool], otherwise: str = "the condition did not come true") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        await asyncio.sleep(0.002)


def ids(prompt: Sequence[int]) -> bytes:
    return array("i", prompt).tobytes()


def params(max_tokens: int = 16, seed: int = 1, **others: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, **others)


async def collect(client: ZmqEngineClient, prompt: Sequence[int], n: int = 1, **options: Any) -> list[ChoiceOutput]:
    """All outputs of one request."""
    outputs: list[ChoiceOutput] = []
    async with client.generate(ids(prompt), params(**options), n=n) as stream:
        async for some in stream:
            assert some
            outputs += some
    return outputs


def tokens_of(outputs: Sequence[ChoiceOutput], choice: int = 0) -> list[int]:
    return [token for output in outputs if output.choice == choice for token in output.token_ids]
