"""Executor: what the loop asks of whatever computes the steps.

``InlineExecutor`` runs the model in the engine's own process, ``worker_executor.WorkerExecutor`` in another; whatever
else computes comes behind the same names. ``backends.load`` picks one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from ..config import MAX_NUM_SEQS, Config
from ..runner.pad_sizes import PadSizes

if TYPE_CHECKING:
    from .._core import Batch
    from ..runner.model_runner import ModelRunner

log = logging.getLogger(__name__)
Layout = Mapping[str, tuple[int, str, int]]  # column -> (byte offset, numpy type, capacity)
Report = Callable[[str, float], None]  # phase, share done
Load = Callable[[Config, Report], "Executor"]


class StepResult(Protocol):
    """One row per sampled row of the batch. ``width`` is 1 + the most log-probabilities that any row asked for; without
    any, logprobs, logprob_ids and ranks are None."""

    @property
    def tokens(self) -> Any: ...  # a buffer of i32 [rows]
    @property
    def logprobs(self) -> NDArray[np.float32] | None: ...  # [rows, width], the sampled token's first
    @property
    def logprob_ids(self) -> NDArray[np.int32] | None: ...  # [rows, width]; -1 where a row asked for fewer
    @property
    def ranks(self) -> NDArray[np.int32] | None: ...  # [rows], 1 is the most likely


class Pending(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Waits for it. Called once, in the order of ``submit``."""
        ...


class ExecutorFacts(NamedTuple):
    """What the scheduler and the clients must know of the model. ``max_model_len``: what the cache can hold, too."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    max_batched_tokens: int
    dtype: str
    device: str
    pad_sizes: tuple[tuple[int, ...], ...] = ((), (), ())  # decodes, mixed sequences, mixed tokens; see core/config.h
    min_shared_tokens: int = 0  # see core/config.h
    memory: tuple[tuple[str, int], ...] = ()  # what takes how many bytes, for people
    notes: tuple[str, ...] = ()  # on what was fitted to the memory, for people
    max_num_seqs: int = MAX_NUM_SEQS
    num_host_blocks: int = 0
    swap_cost: int = 0  # see core/config.h
    cache_bytes: int = 0  # of the host's memory that all blocks may take


class Executor(Protocol):
    """``allocate``, then ``bind``, then ``submit`` for every batch; at most ``depth`` are under way at once."""

    depth: int

    def allocate(self) -> ExecutorFacts:
        """Makes the KV cache. Raises StartupError if it does not fit."""
        ...

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        """``arenas``: the buffers that the scheduler writes batches to."""
        ...

    def submit(self, batch: Batch) -> Pending: ...

    def preparation(self) -> Callable[[], None] | None:
        """A piece of work, well under a second, that makes later steps faster; to be done while nothing is under way.
        None: there is none."""
        ...


class InlineExecutor:
    """Runs the steps in this process; knows one ModelRunner and no other process."""

    def __init__(self, config: Config, runner: ModelRunner) -> None:
        self._config, self._runner = config, runner
        self.depth = runner.device.depth
        self._pad_sizes = PadSizes()

    def allocate(self) -> ExecutorFacts:
        plan, facts = self._runner.plan_memory(), self._runner.facts
        self._pad_sizes = plan.pad_sizes
        if plan.notes:
            log.warning("fitted to the memory: %s", "; ".join(plan.notes))
        self._runner.allocate(plan.num_blocks, plan.num_host_blocks)
        on_host = plan.num_host_blocks + (plan.num_blocks if self._runner.device.machine.is_host else 0)
        return ExecutorFacts(
            vocab_size=facts.vocab_size,
            max_model_len=plan.max_model_len,
            num_blocks=plan.num_blocks,
            max_batched_tokens=plan.max_batched_tokens,
            dtype=facts.dtype,
            device=facts.device,
            pad_sizes=plan.pad_sizes,
            min_shared_tokens=facts.min_shared_tokens,
            memory=plan.rows,
            notes=plan.notes,
            max_num_seqs=plan.max_num_seqs,
            num_host_blocks=plan.num_host_blocks,
            swap_cost=plan.swap_cost,
            cache_bytes=on_host * facts.block_bytes,
        )

    def bind(self, arenas: Sequence[Buffer], layout: Layout) -> None:
        self._runner.bind(arenas, layout, self._pad_sizes)

    def submit(self, batch: Batch) -> Pending:
        return self._runner.submit(batch)

    def preparation(self) -> Callable[[], None] | None:
        return self._runner.preparation()


def load_inline(config: Config, report: Report) -> InlineExecutor:
    """Finds and loads the model. Raises StartupError."""
    from ..checkpoint.hub import resolve
    from ..runner.model_runner import ModelRunner

    return InlineExecutor(config, ModelRunner.load(config, resolve(config.model), report))
