"""An executor without a model, for tests of everything around it.

Its "model" is a keyed sum over the whole context, read back from a KV cache that it fills by slot, as a real one would:
a wrong block, slot, copy, position or seed gives a wrong token, and ``expected`` says which token was right.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from hybrid_serve._core import Batch
from hybrid_serve.config import Config
from hybrid_serve.engine.executor import ExecutorFacts, Layout
from hybrid_serve.engine.worker_executor import WorkerExecutor, load_worker
from hybrid_serve.errors import StartupError

VOCAB_SIZE = 1000
MAX_MODEL_LEN = 4096
POISON = 999
MOST_HOARDED = 512  # times 16 MiB
_WEIGHTS = np.random.default_rng(7).integers(1, 1 << 40, MAX_MODEL_LEN + 1, np.int64)


def next_token(context: NDArray[np.int64], seed: int) -> int:
    with np.errstate(over="ignore"):
        mixed = int((context * _WEIGHTS[: len(context)]).sum()) + len(context) * 7919 + seed * 104729
    return (mixed >> 7) % VOCAB_SIZE


def seed_of_choice(seed: int, choice: int) -> int:
    """As in the core: SplitMix64, the seed itself for choice 0. Signed, as its column is."""
    mask, z = (1 << 64) - 1, seed & ((1 << 64) - 1)
    if choice:
        z = (seed + choice * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def expected(prompt: Sequence[int], seed: int, count: int, choice: int = 0) -> list[int]:
    """The first ``count`` tokens that follow the prompt."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(np.array(context, np.int64), seed_of_choice(seed, choice)))
    return context[len(prompt) :]


class FakeResult(NamedTuple):
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32] | None = None
    logprob_ids: NDArray[np.int32] | None = None
    ranks: NDArray[np.int32] | None = None


class FakePending(NamedTuple):
    value: FakeResult
    ready_at: float

    def result(self) -> FakeResult:
        if self.ready_at:
            time.sleep(max(0.0, self.ready_at - time.monotonic()))
        return self.value


class FakeExecutor:
    """``delay``: seconds a step. ``crash_at``: the step that raises. ``slow_at``: the step that takes ``slow`` seconds.
    ``hoard_at``: the step that takes memory, and writes to it, until there is no more.
    ``on_step``: called with every batch. A sequence that begins with POISON kills the process when it has
    ``poison_length`` tokens."""

    def __init__(
        self,
        num_blocks: int = 256,
        block_size: int = 16,
        depth: int = 1,
        delay: float = 0.0,
        crash_at: int = -1,
        on_step: Callable[[Batch], None] | None = None,
        slow_at: int = -1,
        slow: float = 0.0,
        poison_length: int = MAX_MODEL_LEN + 1,
        num_host_blocks: int = 0,
        hoard_at: int = -1,
    ) -> None:
        self._hoard_at = hoard_at
        self._slow_at, self._slow, self._poison_length = slow_at, slow, poison_length
        self.depth, self._delay, self._crash_at, self.on_step = depth, delay, crash_at, on_step
        self._num_blocks, self._block_size = num_blocks, block_size
        self._cache = np.full((num_blocks, block_size), -1, np.int64)
        self._host = np.full((num_host_blocks, block_size), -1, np.int64)
        self._last = np.empty(0, np.int32)
        self.preparations: list[Callable[[], None]] = []
        self._columns: list[dict[str, NDArray[Any]]] = []

    def allocate(self) -> ExecutorFacts:
        length = min(MAX_MODEL_LEN, self._num_blocks * self._block_size)
        host = len(self._host)
        cache_bytes = 2**20 * self._num_blocks  # so that there is something to advise
        return ExecutorFacts(
            VOCAB_SIZE, length, self._num_blocks, 512, "int64", "fake", num_host_blocks=host, cache_bytes=cache_bytes
        )

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        self._columns = [
            {
                name: np.frombuffer(memoryview(arena), dtype, count, offset)
                for name, (offset, dtype, count) in layout.items()
            }
            for arena in arenas
        ]

    def submit(self, batch: Batch) -> FakePending:
        if batch.step == self._crash_at:
            raise RuntimeError(f"the fake model fails at step {batch.step}")
        if batch.step == self._hoard_at:
            hoard: list[NDArray[np.uint8]] = []
            while len(hoard) < MOST_HOARDED:
                hoard.append(np.ones(2**24, np.uint8))
        if self.on_step is not None:
            self.on_step(batch)
        if batch.step == self._slow_at:
            time.sleep(self._slow)
        ready_at = time.monotonic() + self._delay if self._delay else 0.0
        return FakePending(self._compute(batch), ready_at)

    def preparation(self) -> Callable[[], None] | None:
        return (lambda: self.preparations.pop()()) if self.preparations else None

    def _compute(self, batch: Batch) -> FakeResult:
        columns = self._columns[batch.arena]
        end = batch.num_swap_outs + batch.num_swap_ins
        for index, (source, target) in enumerate(zip(columns["swap_src"][:end], columns["swap_dst"], strict=False)):
            to, of = (self._host, self._cache) if index < batch.num_swap_outs else (self._cache, self._host)
            to[target] = of[source]
        for source, target in zip(columns["copy_src"][: batch.num_copies], columns["copy_dst"], strict=False):
            self._cache[target] = self._cache[source]
        ids = columns["token_ids"][: batch.num_tokens].astype(np.int64)
        unknown = ids < 0
        ids[unknown] = self._last[-ids[unknown] - 1]
        self._cache.reshape(-1)[columns["slots"][: batch.num_tokens]] = ids
        self._die_of_poison(batch, columns)
        rows = columns["sample_rows"][: batch.num_sampled]
        seqs = np.searchsorted(columns["query_start"][1 : batch.num_seqs + 1], rows, side="right")
        tokens = np.empty(batch.num_sampled, np.int32)
        for row, seq in enumerate(seqs):
            start, end = columns["kv_start"][seq], columns["kv_start"][seq + 1]
            context = self._cache[columns["kv_blocks"][start:end]].reshape(-1)[: columns["seq_lens"][seq]]
            tokens[row] = next_token(context, int(columns["seeds"][row]))
        self._last = tokens
        most = int(columns["num_logprobs"][: batch.num_sampled].max(initial=-1))
        return FakeResult(tokens) if most < 0 else _with_logprobs(tokens, columns["num_logprobs"], 1 + most)

    def _die_of_poison(self, batch: Batch, columns: dict[str, NDArray[Any]]) -> None:
        first_blocks = columns["kv_blocks"][columns["kv_start"][: batch.num_seqs]]
        is_deadly = self._cache[first_blocks, 0] == POISON
        if np.any(is_deadly & (columns["seq_lens"][: batch.num_seqs] >= self._poison_length)):
            os.kill(os.getpid(), signal.SIGKILL)


def _with_logprobs(tokens: NDArray[np.int32], asked: NDArray[np.int32], width: int) -> FakeResult:
    """Rank = token % 5 + 1; the i-th alternative is token + i with log-probability -i."""
    logprobs = np.zeros((len(tokens), width), np.float32)
    ids = np.full((len(tokens), width), -1, np.int32)
    for row, token in enumerate(tokens):
        for column in range(1 + asked[row]):
            ids[row, column], logprobs[row, column] = token + column, -column
    return FakeResult(tokens, logprobs, ids, (tokens % 5 + 1).astype(np.int32))


class SteppingFake(FakeExecutor):
    """One whose replicas step together. It keeps count in a file: steps, and empty ones."""

    count_file = Path(os.devnull)
    num_real = num_empty = 0

    def submit(self, batch: Batch) -> FakePending:
        self.num_real += 1
        self._write()
        return super().submit(batch)

    def submit_empty(self) -> FakePending:
        self.num_empty += 1
        self._write()
        return FakePending(FakeResult(np.empty(0, np.int32)), time.monotonic() + self._delay)

    def _write(self) -> None:
        self.count_file.write_text(f"{self.num_real:8} {self.num_empty:8}")


def load_joint(config: Config, report: Callable[[str, float], None]) -> SteppingFake:
    """``fake?steps=FOLDER``: where the file ``steps-PID`` goes."""
    executor = load(config, report, SteppingFake)
    assert isinstance(executor, SteppingFake)
    executor.count_file = Path(config.model.model.partition("steps=")[2]) / f"steps-{os.getpid()}"
    executor._write()
    return executor


def load(config: Config, report: Callable[[str, float], None], kind: type[FakeExecutor] = FakeExecutor) -> FakeExecutor:
    """An ``engine.executor.Load``; the model's name holds its options: ``fake?delay=0.01&depth=2&refuse=1``. With
    ``refuse_after`` or ``slow_load_after``, the path of a file, only the first of several loads goes well; with
    ``slow_load_if`` those before the file is made. ``address_space``: bytes that it may take besides what it has."""
    options = dict(parse_qsl(config.model.model.partition("?")[2]))
    if "address_space" in options:  # beyond what the process has by now
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(options["address_space"])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    report("loading_weights", 0.0)
    time.sleep(float(options.get("load", 0)))
    marker = Path(options.get("refuse_after", options.get("slow_load_after", os.devnull)))
    is_first = not marker.is_file()
    if ("slow_load_after" in options and not is_first) or Path(options.get("slow_load_if", "/nowhere")).exists():
        time.sleep(30)
    if "refuse" in options or ("refuse_after" in options and not is_first):
        raise StartupError("HS-E999", "the fake model refuses", "it was told to", "do not tell it to", exit_code=12)
    if is_first and marker != Path(os.devnull):
        marker.touch()
    report("loading_weights", 1.0)
    return kind(
        config.cache.num_gpu_blocks_override or 256,
        config.cache.block_size,
        int(options.get("depth", 1)),
        float(options.get("delay", 0)),
        int(options.get("crash_at", -1)),
        slow_at=int(options.get("slow_at", -1)),
        slow=float(options.get("slow", 0)),
        poison_length=int(options.get("poison_length", MAX_MODEL_LEN + 1)),
        hoard_at=int(options.get("hoard_at", -1)),
    )


def load_in_worker(config: Config, report: Callable[[str, float], None]) -> WorkerExecutor:
    return load_worker(config, report, "fake_executor:load")
