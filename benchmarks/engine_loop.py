"""What the engine costs around a model that takes no time: Python a step, latency of a request, start of the processes.

    python benchmarks/engine_loop.py [--sequences 1 16 256] [--steps 400] [--no-record]

The loop, scheduler, sockets and client are the real ones; the client runs in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import zmq
from numpy.typing import NDArray
from typing_extensions import Buffer

from hybrid_serve import flight
from hybrid_serve._core import Batch
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.config import Config, SchedulerConfig
from hybrid_serve.engine.executor import ExecutorFacts, Layout
from hybrid_serve.engine.inbox import Inbox
from hybrid_serve.engine.loop import EngineLoop
from hybrid_serve.engine.outbox import Around, Outbox
from hybrid_serve.engine.peers import Peers
from hybrid_serve.engine.phases import Phases
from hybrid_serve.engine.probation import Probation
from hybrid_serve.engine.process import collect_garbage_rarely, make_core
from hybrid_serve.engine.watched import WatchedExecutor
from hybrid_serve.heartbeat import Heartbeat, make, max_watched_ids
from hybrid_serve.sockets import bind_router, connect_dealer
from hybrid_serve.wire import SamplingParams, engine_identity

PROMPT = array("i", range(16)).tobytes()
CONFIG = Config(scheduler=SchedulerConfig(max_num_seqs=256))


class NullResult(NamedTuple):
    tokens: NDArray[np.int32]
    logprobs: None = None
    logprob_ids: None = None
    ranks: None = None


class Done(NamedTuple):
    value: NullResult

    def result(self) -> NullResult:
        return self.value


class NullExecutor:
    """Always token 7, at once. Notes when each batch came, and of how many sequences it was."""

    depth = 1

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []
        self._results = [NullResult(np.full(rows, 7, np.int32)) for rows in range(257)]

    def allocate(self) -> ExecutorFacts:
        return ExecutorFacts(32000, 4096, 20000, 8192, "none", "none")

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        pass

    def submit(self, batch: Batch) -> Done:
        self.times.append((time.perf_counter(), batch.num_sampled))
        return Done(self._results[batch.num_sampled])

    def preparation(self) -> None:
        return None


def load(config: Config, report: Callable[[str, float], None]) -> NullExecutor:
    """An ``executor.Load`` for the start-up."""
    return NullExecutor()


def measure_steps(num_sequences: int, num_steps: int, record: bool) -> dict[str, float]:
    """Microseconds a step while ``num_sequences`` decode, of this process and of the client's."""
    with tempfile.TemporaryDirectory() as directory:
        control, data = f"ipc://{directory}/control", f"ipc://{directory}/engine-0"
        context = zmq.Context()
        supervisor = bind_router(context, control)
        executor = NullExecutor()
        core = make_core(CONFIG, executor, executor.allocate())
        peers = Peers(bind_router(context, data), 1)
        own = connect_dealer(context, control, engine_identity(0))
        heartbeat = Heartbeat(make(max_watched_ids(CONFIG)), max_watched_ids(CONFIG))
        if record:
            core.record(heartbeat.recording, flight.NUM_STEPS)
        probation = Probation(heartbeat.try_out)
        limits = {"longest_prompt": 4095, "max_num_seqs": 256, "max_num_queued_reqs": 1024}
        inbox = Inbox(peers, own, heartbeat, probation, **limits)
        client = subprocess.Popen(
            [sys.executable, __file__, "--client", control, data, str(num_sequences), str(num_steps)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        watched = WatchedExecutor(executor, core, heartbeat)
        phases = Phases()
        outbox = Outbox(peers, probation, watched.gaps, phases, lambda: Around(inbox.may_run, inbox.num_dropped, 0))
        loop = EngineLoop(core, watched, StopWith(inbox, client), outbox, phases)
        collect_garbage_rarely()
        loop.run()
        output, _ = client.communicate()
        supervisor.close()
        context.destroy(linger=0)
    steady = [at for at, rows in executor.times if rows == num_sequences]
    found: dict[str, float] = json.loads(output)
    return {"engine_us": median(np.diff(steady)) * 1e6, **found}


class StopWith:
    """The inbox, until the client has ended."""

    def __init__(self, inbox: Inbox, client: subprocess.Popen[bytes]) -> None:
        self._inbox, self._client, self.stopping = inbox, client, False

    def drain(self, core: Any, wait: bool) -> None:
        while wait and not self._inbox.peers.socket.poll(50):
            if self._client.poll() is not None:
                self.stopping = True
                return
        self._inbox.drain(core, wait=False)


async def run_client(control: str, data: str, num_sequences: int, num_steps: int) -> None:
    client = ZmqEngineClient(CONFIG, 0, control, [(0, data)])
    client.start()
    params = SamplingParams(max_tokens=num_steps, seed=1)

    async def one() -> float:
        began, first = time.perf_counter(), 0.0
        async with client.generate(PROMPT, params) as stream:
            async for _ in stream:
                first = first or time.perf_counter() - began
        return first

    await one()
    before = resource.getrusage(resource.RUSAGE_SELF)
    await asyncio.gather(*(one() for _ in range(num_sequences)))
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    params = SamplingParams(max_tokens=1, seed=1)
    firsts = [await one() for _ in range(300)]
    print(json.dumps({"client_us": used / num_steps * 1e6, "first_step_us": median(firsts) * 1e6}))
    client.close()


def measure_start() -> float:
    """Seconds from nothing to "ready", with the stand-ins of the tests for model and HTTP server."""
    tests = Path(__file__).parents[1] / "tests" / "python"
    sys.path[:0] = [str(tests)]
    from server_process import ServerProcess

    seconds = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            with ServerProcess(Path(directory)) as server:
                server.wait_ready()
                seconds.append(time.perf_counter() - began)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, default=True, help="as a server does")
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        control, data, *numbers = options.client
        asyncio.run(run_client(control, data, *map(int, numbers)))
        return
    for count in options.sequences:
        found = measure_steps(count, options.steps, options.record)
        engine, client, first = found["engine_us"], found["client_us"], found["first_step_us"]
        costs = f"engine {engine:4.0f} us a step, client {client:4.0f} us of CPU a step"
        print(f"{count:4} sequences: {costs}, ADD to first output {first:4.0f} us")
    print(f"start of the processes: {measure_start():.2f} s")


if __name__ == "__main__":
    main()
