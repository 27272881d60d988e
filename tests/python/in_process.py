"""A generate loop in one process: the real scheduler and the real runner, without engine, sockets or text."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_serve import _core
from hybrid_serve.checkpoint.hub import resolve
from hybrid_serve.config import CacheConfig, Config, EngineConfig, ModelConfig
from hybrid_serve.runner.model_runner import ModelRunner
from hybrid_serve.runner.pad_sizes import PadSizes
from hybrid_serve.runner.step import Pending, StepResult


def load_runner(model: Path | str, **settings: Any) -> ModelRunner:
    """``settings``: fields of ModelConfig, EngineConfig and CacheConfig (``dtype="float32"``, ``device="cuda"``)."""
    engine = {name: settings.pop(name) for name in ("device", "enforce_eager", "batch_invariant") if name in settings}
    cache = {name: settings.pop(name) for name in ("kv_cache_dtype",) if name in settings}
    config = Config(ModelConfig(model=str(model), **settings), CacheConfig(**cache), engine=EngineConfig(**engine))
    return ModelRunner.load(config, resolve(config.model), lambda phase, share: None)


@dataclass
class Generator:
    """Runs requests to their end. Each ``generate`` starts with an empty cache unless ``keep_cache``."""

    runner: ModelRunner
    num_blocks: int = 256
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    num_host_blocks: int = 0
    pad_sizes: PadSizes = field(default_factory=PadSizes)
    min_shared_tokens: int = 0
    results: list[StepResult] = field(default_factory=list)  # of every step of the last call
    num_prefixes: int = 0  # groups of decodes that begin alike, of all steps

    def __post_init__(self) -> None:
        config = _core.Config(
            num_blocks=self.num_blocks,
            block_size=self.runner.config.cache.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=min(self.runner.facts.max_model_len, self.num_blocks * self.runner.config.cache.block_size),
            vocab_size=self.runner.facts.vocab_size,
            enable_prefix_caching=self.enable_prefix_caching,
            num_host_blocks=self.num_host_blocks,
            depth=self.runner.device.depth,
            decode_sizes=self.pad_sizes.decodes,
            mixed_seq_sizes=self.pad_sizes.mixed_seqs,
            mixed_token_sizes=self.pad_sizes.mixed_tokens,
            min_shared_tokens=self.min_shared_tokens,
        )
        size, layout = _core.batch_layout(config)
        arenas = [mmap.mmap(-1, size) for _ in range(self.runner.device.depth + 1)]
        self.scheduler = _core.Scheduler(config, arenas)
        self.runner.allocate(self.num_blocks, self.num_host_blocks)
        self.runner.bind(arenas, layout, self.pad_sizes)
        self._next_id = 0

    def generate(self, prompts: Sequence[Sequence[int]], *, n: int = 1, **params: Any) -> list[list[int]]:
        """Token ids of every choice, prompts in order, their ``n`` choices in order. Greedy unless ``params`` (keyword
        arguments of ``Scheduler.add``) say otherwise."""
        params = {"temperature": 0.0, "max_tokens": 16} | params
        first = self._next_id
        self._next_id += len(prompts) * n
        for index, prompt in enumerate(prompts):
            self.scheduler.add(first + index * n, np.array(prompt, np.int32).data, n=n, **params)
        found: list[list[int]] = [[] for _ in range(len(prompts) * n)]
        self.results.clear()
        in_flight: deque[tuple[_core.Batch, Pending]] = deque()
        while True:
            while len(in_flight) < self.runner.device.depth and (batch := self.scheduler.schedule()) is not None:
                self.num_prefixes += batch.num_prefixes
                in_flight.append((batch, self.runner.submit(batch)))
            if not in_flight:
                break
            batch, pending = in_flight.popleft()
            result = pending.result()
            self.results.append(result)
            outputs = self.scheduler.commit(batch.step, result.tokens.data)
            for request, token in zip(outputs.ids.tolist(), outputs.tokens.tolist(), strict=True):
                found[request - first].append(token)
        assert self.scheduler.idle
        self.scheduler.check_invariants()
        return found
