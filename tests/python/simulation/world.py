"""One seed: a server, its clients, and everything that befalls them; and what must be true at the end."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine_harness import ids
from fake_executor import VOCAB_SIZE, expected
from hybrid_serve.client import EngineRejected
from hybrid_serve.shared_memory import OPEN_SLOT_BYTES
from hybrid_serve.wire import SamplingParams

from .network import Faults, Network
from .processes import SimApiServer, SimEngine, SimSupervisor
from .virtual_time import VirtualClock, VirtualLoop

TROUBLE_SECONDS = 8.0  # then the network carries everything, and nobody is killed
PATIENCE = 90.0  # seconds until every request has ended after that
SETTLE_SECONDS = 10.0  # until nothing is left of them: a few CHECKs
LONG = 400  # tokens of a request that nobody waits for to the end
CALM = 0.15  # part of the seeds in which nothing goes wrong


class SimulationFailed(AssertionError):
    """Says the seed, and the line that runs it again."""


@dataclass
class Outcome:
    """Of one seed."""

    digest: str = ""  # of all that happened
    num_events: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # of requests: "whole", "left", or an error's code
    counts: Counter[str] = field(default_factory=Counter)  # faults, deaths, replays


def run(seed: int, show: Callable[[str], None] | None = None) -> Outcome:
    """``show`` is given every event as a line. Raises SimulationFailed."""
    world = World(seed, show)
    logging.disable(logging.NOTSET if show else logging.CRITICAL)
    try:
        return world.run()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        place = traceback.extract_tb(error.__traceback__)[-1]
        again = f"PYTHONPATH=python:tests/python python -m simulation --show {seed}"
        where = "" if isinstance(error, AssertionError) else f" ({place.filename}:{place.lineno})"
        raise SimulationFailed(f"seed {seed}: {why}{where}; again: {again}") from error
    finally:
        logging.disable(logging.NOTSET)


class World:
    """Knows every process and every request; decides by its seed what happens to them."""

    def __init__(self, seed: int, show: Callable[[str], None] | None) -> None:
        self._seed, self._show = seed, show
        self._rng = random.Random(f"{seed} world")
        self._hash, self.outcome = hashlib.sha256(), Outcome()
        self._loop = VirtualLoop()
        self._clock = VirtualClock(self._loop)
        self._requests: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._is_limited = False  # requests may be refused for that

    def run(self) -> Outcome:
        with self._clock.rules():
            try:
                self._loop.run_until_complete(self._main())
            finally:
                for task in asyncio.all_tasks(self._loop):
                    task.cancel()
                    task.add_done_callback(lambda task: task.cancelled() or task.exception())
                self._loop.run_until_complete(asyncio.sleep(0))
                self._loop.close()
        self.outcome.digest = self._hash.hexdigest()
        return self.outcome

    def _tell(self, what: str, *more: Any) -> None:
        line = f"{self._loop.time() - 1000:.6f} {what} {' '.join(map(str, more))}"
        self._hash.update(line.encode())
        self.outcome.num_events += 1
        if what == "network":
            self.outcome.counts[str(more[0])] += 1
        if self._show is not None:
            self._show(line if len(line) < 400 else f"{line[:400]}...")

    async def _main(self) -> None:
        rng = self._rng
        self._is_calm = rng.random() < CALM
        faults = Faults() if self._is_calm else Faults.drawn(rng)
        self._num_engines, self._num_clients = rng.choice((1, 1, 2)), rng.choice((1, 1, 2))
        self._network = Network(
            self._loop,
            random.Random(f"{self._seed} network"),
            faults,
            lambda address: "engine" in address,
            self._tell,
        )
        machines = random.Random(f"{self._seed} machines")
        self._supervisor = SimSupervisor(self._network, self._clock, machines, self._num_engines, self._num_clients)
        self._open_memory = memoryview(bytearray(self._num_clients * OPEN_SLOT_BYTES))
        self._servers = [self._serve(index, 0) for index in range(self._num_clients)]
        troubles = [self._go(self._arrivals(index), "arrivals") for index in range(self._num_clients)]
        if not self._is_calm:
            if rng.random() < 0.5:
                troubles.append(self._go(self._kill_engines(), "engine deaths"))
            if rng.random() < 0.3:
                troubles.append(self._go(self._kill_servers(), "server deaths"))
            if rng.random() < 0.2:
                troubles.append(self._go(self._limit(), "limits"))
            if rng.random() < 0.3:
                troubles.append(self._go(self._silences(), "silences"))
        await asyncio.gather(*troubles)
        self._network.heal()
        self._tell("healed")
        await self._until(lambda: not self._requests, lambda: f"{len(self._requests)} requests have not ended")
        for engine in self._engines():
            engine.step_seconds = 0.1  # what runs on for nobody is still there when we look
        await self._until(lambda: not self._faults(), lambda: "; ".join(self._faults()), SETTLE_SECONDS)
        for engine in self._engines():
            engine.parts.core.check_invariants()
        counts, groups = self.outcome.counts, [server.client.group for server in self._servers]
        counts["replayed"] = sum(group.num_replayed for group in groups)
        counts["engine deaths"] = self._supervisor.num_deaths
        if self._is_calm:
            assert not counts["replayed"], "something was lost in a calm sea"
        self._supervisor.stop()
        await self._until(lambda: all(engine.task.done() for engine in self._engines()), lambda: "an engine goes on")
        for server in self._servers:
            server.client.close()

    def _go(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        return self._loop.create_task(coroutine, name=name)

    async def _until(
        self, condition: Callable[[], bool], otherwise: Callable[[], str], seconds: float = PATIENCE
    ) -> None:
        deadline = self._loop.time() + seconds
        while not condition():
            self._raise_failure()
            assert self._loop.time() < deadline, otherwise()
            await asyncio.sleep(0.05)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        for index, engine in enumerate(self._engines()):
            if engine.task.done() and (error := engine.task.exception()) is not None:
                raise RuntimeError(f"engine {index} died of itself") from error

    def _engines(self) -> list[SimEngine]:
        return [engine for engine in self._supervisor.engines if engine is not None]

    def _faults(self) -> list[str]:
        of_engines = [f"engine {index} {fault}" for index, each in enumerate(self._engines()) for fault in each.faults]
        return of_engines + [f"API server {each.index} {fault}" for each in self._servers for fault in each.faults]

    # What happens

    def _serve(self, index: int, launch: int) -> SimApiServer:
        return SimApiServer(self._network, index, launch, self._num_engines, self._open_memory)

    async def _kill_engines(self) -> None:
        rng = random.Random(f"{self._seed} engine deaths")
        for _ in range(rng.randrange(1, 5)):
            await asyncio.sleep(rng.random() * TROUBLE_SECONDS / 4)
            index = rng.randrange(self._num_engines)
            self._tell("engine dies", index)
            await self._supervisor.kill(index)

    async def _kill_servers(self) -> None:
        rng = random.Random(f"{self._seed} server deaths")
        for launch in range(1, rng.randrange(2, 4)):
            await asyncio.sleep(rng.random() * TROUBLE_SECONDS / 3)
            index = rng.randrange(self._num_clients)
            self._tell("API server dies", index)
            self._servers[index].kill()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random())
            self._servers[index] = self._serve(index, launch)

    async def _silences(self) -> None:
        rng = random.Random(f"{self._seed} silences")
        for _ in range(rng.randrange(1, 6)):
            await asyncio.sleep(rng.random() * TROUBLE_SECONDS / 4)
            self._tell("network", "silence")
            self._network.silent_until = self._loop.time() + rng.expovariate(2.0)

    async def _limit(self) -> None:
        rng = random.Random(f"{self._seed} limits")
        for _ in range(3):
            await asyncio.sleep(rng.random() * TROUBLE_SECONDS / 3)
            self._is_limited = True
            self._servers[rng.randrange(self._num_clients)].client.limit(rng.choice((0, 1, 5)), rng.choice((0, 1, 4)))

    async def _arrivals(self, index: int) -> None:
        rng = random.Random(f"{self._seed} requests of {index}")
        base = [rng.randrange(VOCAB_SIZE - 1) for _ in range(40)]
        until = self._loop.time() + TROUBLE_SECONDS
        for number in range(rng.randrange(2, 9)):
            await asyncio.sleep(min(rng.choice((0.0, 0.02, rng.expovariate(1.0))), until - self._loop.time()))
            own = [rng.randrange(VOCAB_SIZE - 1) for _ in range(rng.randrange(1, 30))]
            prompt = base[: rng.choice((0, 17, 33))] + own
            while (server := self._servers[index]).is_dead:
                await asyncio.sleep(0.1)
            is_left = rng.random() < 0.15
            count = LONG if is_left else rng.choice((1, 4, 15))
            task = self._go(self._ask(server, prompt, count, rng), f"request {number} of {index}")
            for tasks in (server.tasks, self._requests):
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            task.add_done_callback(self._ended)
            if is_left:
                self._loop.call_later(rng.choice((0.0, 0.05, rng.random())), task.cancel)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self.outcome.ends["left"] += 1
        elif self._failure is None:
            self._failure = task.exception()

    async def _ask(self, server: SimApiServer, prompt: list[int], count: int, rng: random.Random) -> None:
        n, seed = rng.choice((1, 1, 1, 2, 3)), rng.getrandbits(32)
        wanted = [expected(prompt, seed, min(count, 30), choice) for choice in range(n)]
        params = SamplingParams(max_tokens=count, seed=seed, logprobs=rng.choice((-1, -1, -1, 0, 2)))
        if count < LONG and rng.random() < 0.2:
            stop = wanted[0][rng.randrange(count)]
            params = msgspec.structs.replace(params, stop_token_ids=(stop,))
            wanted = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in wanted]
        dropped = rng.randrange(n) if n > 1 and rng.random() < 0.2 else None
        got: list[list[int]] = [[] for _ in range(n)]
        priority, rank = rng.choice((0, 0, 1)), rng.randrange(self._num_engines) if rng.random() < 0.1 else None
        name = f"{server.index}: {n} x {count} tokens behind {len(prompt)}"
        try:
            async with server.client.generate(ids(prompt), params, n=n, priority=priority, rank=rank) as stream:
                async for outputs in stream:
                    for output in outputs:
                        got[output.choice] += output.token_ids
                        right = wanted[output.choice][: len(got[output.choice])]
                        seen = got[output.choice][:30] if count == LONG else got[output.choice]
                        assert seen == right, f"{name}: {seen} instead of {right}"
                        ranks = [token % 5 + 1 for token in output.token_ids] if params.logprobs >= 0 else []
                        assert [each.rank for each in output.logprobs] == ranks, name
                    if dropped is not None and got[dropped]:
                        stream.abort(dropped)
        except EngineRejected as error:
            self._check_refusal(error, name, rank is not None)
            self._finish(error.code)
            return
        for choice in range(n):
            is_whole = choice == dropped or count == LONG or got[choice] == wanted[choice]
            assert is_whole, f"{name}: ends with {got[choice]}"
        self._finish("whole" if count < LONG else "left")

    def _check_refusal(self, error: EngineRejected, name: str, names_engine: bool) -> None:
        is_right = {
            "request_quarantined": self._supervisor.num_deaths > 1,  # twice while it ran
            "engine_restarting": names_engine,
            "overloaded": self._is_limited,
            "engine_dead": not self._is_calm and "times in a row" in str(error),
        }
        assert is_right.get(error.code, False), f"{name}: {error}"

    def _finish(self, how: str) -> None:
        self.outcome.ends[how] += 1
        self._tell("ends", how)
