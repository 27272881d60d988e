"""The core's decisions beside those of a plain model in Python, whatever it is told (F-22)."""

from __future__ import annotations

import mmap
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from hybrid_serve import _core, flight
from reference_scheduler import ReferenceScheduler, Row

VOCAB = 5


class Beside(RuleBasedStateMachine):
    """The same calls to both. A difference leaves a recording that ``hybrid-serve replay`` reads."""

    @initialize(
        num_blocks=st.integers(4, 12),
        block_size=st.integers(1, 4),
        seqs=st.integers(1, 5),
        spare=st.integers(0, 8),
        max_len=st.integers(8, 32),
        depth=st.integers(1, 2),
        caches=st.booleans(),
    )
    def begin(
        self, num_blocks: int, block_size: int, seqs: int, spare: int, max_len: int, depth: int, caches: bool
    ) -> None:
        config = _core.Config(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + spare,
            max_model_len=max_len,
            vocab_size=VOCAB,
            depth=depth,
            enable_prefix_caching=caches,
        )
        size, self.columns = _core.batch_layout(config)
        self.arenas = [np.zeros(size, np.uint8) for _ in range(depth + 1)]
        self.core = _core.Scheduler(config, self.arenas)
        self.memory = mmap.mmap(-1, 2**20)
        self.core.record(self.memory, 1000)
        self.reference = ReferenceScheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=seqs,
            budget=seqs + spare,
            max_len=max_len,
            depth=depth,
            caches=caches,
        )
        self.next_id, self.batches = 10, list[_core.Batch]()

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 20),
        most=st.integers(1, 12),
        least=st.integers(0, 1),
        generated=st.integers(0, 2),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        stops=st.sets(st.integers(0, VOCAB - 1), max_size=1),
        salt=st.sampled_from([b"", b"", b"other"]),
    )
    def add(
        self,
        family: int,
        length: int,
        most: int,
        least: int,
        generated: int,
        priority: int,
        stops: set[int],
        salt: bytes,
    ) -> None:
        tokens = [(family + i * (family + 1)) % VOCAB for i in range(length + generated)]  # few beginnings
        options: dict[str, Any] = {"max_tokens": most, "min_tokens": least, "stop_token_ids": sorted(stops)}
        options |= {"num_generated": generated, "priority": priority, "cache_salt": salt}
        try:
            self.core.add(self.next_id, np.array(tokens, np.int32), **options)
        except ValueError:
            return  # it can never run; which ones is for other tests
        self.reference.add(self.next_id, tokens, generated, priority, most, least, stops, salt)
        self.next_id += 1

    @rule(back=st.integers(1, 8))
    def abort(self, back: int) -> None:
        num_live = self.core.abort(np.array([self.next_id - back], np.uint64))
        self.same("abort", num_live, int(self.reference.abort(self.next_id - back)))

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.schedule()
            self.commit()

    @rule()
    def schedule(self) -> None:
        batch, rows = self.core.schedule(), self.reference.schedule()
        self.same("schedule", None if batch is None else self.rows(batch), rows)
        if batch is not None:
            self.batches.append(batch)

    @rule()
    def commit(self) -> None:
        if not self.batches:
            return
        batch = self.batches.pop(0)
        tokens = [(batch.step * 3 + row * 2) % VOCAB for row in range(batch.num_sampled)]
        outputs = self.core.commit(batch.step, np.array(tokens, np.int32))
        given = list(zip(outputs.ids, outputs.tokens, outputs.finish, strict=True))
        self.same("commit", given, self.reference.commit(tokens))

    @rule()
    def forget(self) -> None:
        self.core.forget_prefixes()
        self.reference.forget()

    def rows(self, batch: _core.Batch) -> list[Row]:
        def column(name: str, count: int) -> list[int]:
            offset, dtype, _ = self.columns[name]
            found: list[int] = np.frombuffer(self.arenas[batch.arena], dtype, count, offset).tolist()
            return found

        starts, blocks = column("query_start", batch.num_seqs + 1), column("kv_start", batch.num_seqs + 1)
        table, lengths = column("kv_blocks", blocks[-1]), column("seq_lens", batch.num_seqs)
        return [
            Row(starts[i + 1] - starts[i], lengths[i], table[blocks[i] : blocks[i + 1]]) for i in range(batch.num_seqs)
        ]

    def same(self, call: str, core: Any, reference: Any) -> None:
        if core == reference:
            return
        recording = flight.read_memory(memoryview(self.memory))
        assert recording is not None
        path = flight.new_path(Path(tempfile.mkdtemp()), 0, time.time())
        flight.write(path, recording, why=f"{call} differs from the reference")
        raise AssertionError(f"{call}: the core {core}, the reference {reference}; hybrid-serve replay {path}")


SETTINGS = settings(
    max_examples=80, stateful_step_count=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.timeout(600)  # when it fails, a short counter-example takes minutes to be found
def test_the_core_decides_as_the_reference_does() -> None:
    run_state_machine_as_test(Beside, settings=SETTINGS)
