"""What a key that floods a server does to another that asks now and then (F-45): the quiet key's time to first token
alone and beside the flood, on a real server with two keys.

    PYTHONPATH=python python benchmarks/noisy_neighbour.py [--paced] [--rounds 3] [--long 1024] [-- FLAGS OF SERVE]

The flood: --flood long prompts at once, each with a reply of --reply tokens. The quiet key: a prompt of --short tokens
every --gap seconds, --count times alone, and as often from --settle seconds after the flood on. No prompt begins like
another. Prints a row a round, each on a server of its own, and last the medians.

--paced: instead of the demo model one that only sleeps, --step seconds a step and --token seconds a token of it, behind
the same server: then other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from engine_loop import NullResult
from typing_extensions import Buffer

from hybrid_serve._core import Batch
from hybrid_serve.cli.bench.load import Outcome, Prompt, Target, send
from hybrid_serve.cli.http_client import HttpClient
from hybrid_serve.config import Config
from hybrid_serve.engine.executor import ExecutorFacts, Layout

QUIET, NOISY = "key-of-the-quiet", "key-of-the-noisy"
VOCAB = 30_000
REPLY = 8  # tokens to the quiet key
PACED = """
import sys
sys.path[:] = {path!r}
from hybrid_serve.checkpoint import demo
from hybrid_serve.cli import options
from hybrid_serve.config import ModelConfig
from dataclasses import replace
from hybrid_serve.launch import supervisor
config = options.parse(["paced?{step},{token}", *{flags!r}], {{}}).config
file = demo.unless_named(ModelConfig()).model
config = replace(config, model=replace(config.model, tokenizer=file))
raise SystemExit(supervisor.serve(config, load="noisy_neighbour:load_paced"))
"""


class Sleep(NamedTuple):
    until: float
    tokens: NullResult

    def result(self) -> NullResult:
        time.sleep(max(0.0, self.until - time.monotonic()))
        return self.tokens


class PacedExecutor:
    """Takes the time of a model and always says the same word."""

    depth = 1

    def __init__(self, config: Config, step: float, token: float) -> None:
        self._config, self._step, self._token = config, step, token

    def allocate(self) -> ExecutorFacts:
        tokens = self._config.scheduler.max_num_batched_tokens or 512
        seqs = min(tokens, self._config.scheduler.max_num_seqs or 256)
        return ExecutorFacts(VOCAB, 8192, 2048, tokens, "none", "paced", max_num_seqs=seqs)

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        pass

    def submit(self, batch: Batch) -> Sleep:
        until = time.monotonic() + self._step + self._token * batch.num_tokens
        return Sleep(until, NullResult(np.full(batch.num_sampled, 1000, np.int32)))

    def preparation(self) -> None:
        return None


def load_paced(config: Config, report: Callable[[str, float], None]) -> PacedExecutor:
    step, token = config.model.model.partition("?")[2].split(",")
    return PacedExecutor(config, float(step), float(token))


class Server:
    """A child with two keys on a free port, ended when the block is left."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        flags = ["--port", "0", "--api-key", QUIET, "--api-key", NOISY, *chosen.flags]
        self._command = [sys.executable, "-m", "hybrid_serve", "serve", *flags]
        if chosen.paced:
            code = PACED.format(path=sys.path, step=chosen.step, token=chosen.token, flags=flags)
            self._command = [sys.executable, "-c", code]

    def __enter__(self) -> str:
        self._log = tempfile.NamedTemporaryFile(prefix="noisy-neighbour-")
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        while "ready in" not in (text := Path(self._log.name).read_text()):
            if self._process.poll() is not None:
                raise SystemExit(text)
            time.sleep(0.02)
        found = re.search(r"http://[^/\s]+", text)
        assert found, text
        return found[0]

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.terminate()
        self._process.wait(60)
        self._log.close()


class Found(NamedTuple):
    """Seconds to the first token of each request of the quiet key; the engine's tokens a second beside the flood."""

    alone: list[float]
    beside: list[float]
    rate: float


class Clients:
    """Those of both keys; knows what they ask, not what is measured."""

    def __init__(self, url: str, chosen: argparse.Namespace, dice: random.Random) -> None:
        self._clients = {key: HttpClient(url, key) for key in (QUIET, NOISY)}
        self._chosen, self._dice = chosen, dice

    async def ask(self, key: str, length: int, reply: int) -> Outcome:
        ids = [self._dice.randrange(1000, VOCAB) for _ in range(length)]
        fields = {"prompt": ids, "ignore_eos": True, "temperature": 0}
        return await send(Target(self._clients[key], "/v1/completions", "", False, fields), Prompt("", length, reply))

    async def quiet(self) -> list[float]:
        """One after the other, whether the last one is answered or not."""
        began, tasks = time.monotonic(), []
        for number in range(self._chosen.count):
            await asyncio.sleep(max(0.0, began + number * self._chosen.gap - time.monotonic()))
            tasks.append(asyncio.create_task(self.ask(QUIET, self._chosen.short, REPLY)))
        outcomes = await asyncio.gather(*tasks)
        if failed := [outcome.error for outcome in outcomes if outcome.error]:
            raise SystemExit(failed[0])
        return [outcome.ttft for outcome in outcomes]

    async def computed(self) -> float:
        """Tokens of all steps so far."""
        async with self._clients[QUIET].request("GET", "/metrics") as answer:
            found = re.search(
                r"^vllm:iteration_tokens_total_sum\S* (\S+)$", (await answer.read()).decode(), re.MULTILINE
            )
        assert found
        return float(found[1])


async def measure(url: str, chosen: argparse.Namespace, dice: random.Random) -> Found:
    clients = Clients(url, chosen, dice)
    for _ in range(3):
        await clients.ask(QUIET, chosen.short, REPLY)
    alone = await clients.quiet()
    flood = [asyncio.create_task(clients.ask(NOISY, chosen.long, chosen.reply)) for _ in range(chosen.flood)]
    await asyncio.sleep(chosen.settle)
    began, before = time.monotonic(), await clients.computed()
    beside = await clients.quiet()
    rate = (await clients.computed() - before) / (time.monotonic() - began)
    if failed := [task.result().error for task in flood if task.done() and task.result().error]:
        raise SystemExit(f"of the flood: {failed[0]}")
    if all(task.done() for task in flood):
        raise SystemExit("the flood was over before the quiet key's last request: a larger --flood")
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    return Found(alone, beside, rate)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paced", action="store_true")
    parser.add_argument("--step", type=float, default=0.015, metavar="SECONDS")
    parser.add_argument("--token", type=float, default=0.0005, metavar="SECONDS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flood", type=int, default=500)
    parser.add_argument("--long", type=int, default=1024)
    parser.add_argument("--reply", type=int, default=64)
    parser.add_argument("--short", type=int, default=32)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--gap", type=float, default=1.0)
    parser.add_argument("--settle", type=float, default=5.0, help="seconds from the flood to the quiet key's first")
    parser.add_argument("flags", nargs="*", help="of serve")
    chosen = parser.parse_args()
    dice, rows = random.Random(0), list[list[float]]()
    print("| alone p50, p99 ms | beside the flood p50, p99 ms | ratio p50, p99 | tok/s of steps |\n|---|---|---|---|")
    for _ in range(chosen.rounds):
        with Server(chosen) as url:
            found = asyncio.run(measure(url, chosen, dice))
        times = [percentile(one, share) * 1e3 for one in (found.alone, found.beside) for share in (0.5, 0.99)]
        rows.append([*times, times[2] / times[0], times[3] / times[1], found.rate])
        print(row(rows[-1]), flush=True)
    print(row([median(column) for column in zip(*rows, strict=True)]), "medians")


def row(values: Sequence[float]) -> str:
    a, b, c, d, p50, p99, rate = values
    return f"| {a:.0f}, {b:.0f} | {c:.0f}, {d:.0f} | {p50:.1f}, {p99:.1f} | {rate:.0f} |"


if __name__ == "__main__":
    main()
