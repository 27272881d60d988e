"""The ``_core`` module: what crosses between Python and the scheduler, and what is refused on the way."""

from __future__ import annotations

import ast
import gc
import inspect
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hybrid_serve import _core
from hybrid_serve.wire import STEP_TOKEN_BOUNDS, FinishReason


def config(**changes: Any) -> _core.Config:
    fields: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "vocab_size": 100,
    }
    return _core.Config(**(fields | changes))


def tokens(n: int, start: int = 0) -> npt.NDArray[np.int32]:
    return (np.arange(start, start + n) % 100).astype(np.int32)


class Machine:
    """A scheduler, its arenas, and an executor that answers every row with (position + 1) % vocab."""

    def __init__(self, cfg: _core.Config) -> None:
        self.config = cfg
        size, self.columns = _core.batch_layout(cfg)
        self.arenas = [np.zeros(size, np.uint8) for _ in range(cfg.depth + 1)]
        self.core = _core.Scheduler(cfg, self.arenas)

    def column(self, batch: _core.Batch, name: str, n: int) -> npt.NDArray[Any]:
        offset, dtype, capacity = self.columns[name]
        assert n <= capacity
        return np.frombuffer(self.arenas[batch.arena], dtype, n, offset)

    def pick(self, batch: _core.Batch) -> npt.NDArray[np.int32]:
        return (self.column(batch, "sample_positions", batch.num_sampled) % self.config.vocab_size).astype(np.int32)

    def run(self) -> dict[int, list[int]]:
        given: dict[int, list[int]] = {}
        while not self.core.idle:
            batch = self.core.schedule()
            assert batch is not None
            outputs = self.core.commit(batch.step, self.pick(batch))
            for request, token in zip(outputs.ids, outputs.tokens, strict=True):
                given.setdefault(request, []).append(token)
        return given


def test_a_request_runs_to_its_end() -> None:
    m = Machine(config())
    m.core.add(2**48 + 7, tokens(5), max_tokens=3, temperature=0.0)
    batch = m.core.schedule()
    assert batch is not None
    assert (batch.step, batch.num_tokens, batch.num_seqs, batch.num_sampled) == (0, 5, 1, 1)
    assert m.column(batch, "token_ids", 5).tolist() == [0, 1, 2, 3, 4]
    header = m.column(batch, "header", 16).tolist()
    assert header[:6] == [0, 5, 1, 0, 1, 5]
    assert header[9] == batch.bytes_used
    outputs = m.core.commit(batch.step, m.pick(batch))
    assert outputs.num_rows == 1
    assert list(outputs.ids) == [2**48 + 7]
    assert list(outputs.finish) == [FinishReason.NONE]
    assert list(outputs.cached_tokens) == [0]
    assert m.run() == {2**48 + 7: [6, 7]}
    m.core.check_invariants()
    assert m.core.stats().blocks_used == 0
    assert m.core.stats().steps == 3


def test_outputs_are_read_only_columns_that_numpy_reads_without_a_copy() -> None:
    m = Machine(config(num_clients=2))
    m.core.add(1, tokens(3), client=1)
    m.core.add(2, tokens(3), client=0)
    batch = m.core.schedule()
    assert batch is not None
    outputs = m.core.commit(batch.step, m.pick(batch))
    expected = {"client_start": "i4", "ids": "u8", "tokens": "i4", "finish": "u1", "cached_tokens": "i4", "rows": "i4"}
    expected |= {"num_preemptions": "i4", "scheduled_at": "i8"}
    for name, dtype in expected.items():
        view = getattr(outputs, name)
        assert isinstance(view, memoryview)
        assert view.readonly
        assert np.asarray(view).dtype == np.dtype(dtype), name
    assert list(outputs.client_start) == [0, 1, 2]
    assert list(outputs.ids) == [2, 1]
    assert list(outputs.rows) == [1, 0]


def test_a_choice_says_once_when_it_first_ran_by_the_clock_of_the_caller() -> None:
    m = Machine(config())
    m.core.add(1, tokens(3), max_tokens=2)
    told = []
    for now in (700, 800):
        batch = m.core.schedule(now)
        assert batch is not None
        outputs = m.core.commit(batch.step, m.pick(batch))
        told.append((list(outputs.scheduled_at), list(outputs.num_preemptions)))
    assert told == [([700], [0]), ([-1], [0])]


def test_steps_are_counted_by_their_tokens() -> None:
    m = Machine(config(enable_prefix_caching=False))
    for id, length in enumerate((1, 2, 3, 4, 5)):
        m.core.add(id, tokens(length), max_tokens=1)
        m.run()
    counts = m.core.stats().step_token_counts
    assert len(counts) == len(STEP_TOKEN_BOUNDS) + 1
    assert counts[:5] == [1, 1, 2, 1, 0]  # of at most 1, 2, 4, 8, 16 tokens
    assert sum(counts) == m.core.stats().steps


def test_columns_outlive_the_scheduler() -> None:
    m = Machine(config())
    m.core.add(1, tokens(3))
    batch = m.core.schedule()
    assert batch is not None
    ids = m.core.commit(batch.step, m.pick(batch)).ids
    del m
    gc.collect()
    assert list(ids) == [1]


def test_arenas_are_kept_and_cannot_be_resized() -> None:
    cfg = config()
    size, _ = _core.batch_layout(cfg)
    arena = bytearray(size)
    core = _core.Scheduler(cfg, [arena, bytearray(size)])
    with pytest.raises(BufferError):
        arena.extend(b"x")
    del core
    gc.collect()
    arena.extend(b"x")


def test_arenas_that_cannot_serve_are_refused() -> None:
    cfg = config()
    size, _ = _core.batch_layout(cfg)
    with pytest.raises(ValueError, match=f"must be contiguous and have {size}"):
        _core.Scheduler(cfg, [bytearray(size), bytearray(size - 1)])
    with pytest.raises(ValueError, match="1 arenas, depth 1 needs 2"):
        _core.Scheduler(cfg, [bytearray(size)])
    with pytest.raises((BufferError, ValueError)):
        _core.Scheduler(cfg, [bytes(size), bytes(size)])
    with pytest.raises(ValueError, match="contiguous"):
        _core.Scheduler(cfg, [np.zeros(2 * size, np.uint8)[::2], bytearray(size)])
    with pytest.raises(ValueError, match="aligned to 8"):
        _core.Scheduler(cfg, [np.zeros(size + 1, np.uint8)[1:], bytearray(size)])


def test_a_configuration_names_the_field_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="block_size is 0"):
        config(block_size=0)
    with pytest.raises(ValueError, match="hash_key has 3 bytes, must have 16"):
        config(hash_key=b"abc")
    with pytest.raises(ValueError, match="num_blocks is 36893488147419103232, does not fit 64 bits"):
        config(num_blocks=2**65)
    assert config().max_adjustments == 400
    assert config(hash_key=bytes(range(16))).hash_key == bytes(range(16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"frequency_penalty": 3.0}, "frequency_penalty is 3"),
        ({"n": 0}, "n is 0"),
        ({"n": 9}, r"n is 9, must be in \[1, 8\]"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 2**31}, "min_tokens is 2147483648"),
        ({"min_tokens": 2**63}, "min_tokens is 9223372036854775808, does not fit 64 bits"),
        ({"client": 1}, "client is 1"),
        ({"stop_token_ids": [100]}, "stop_token_ids contains 100"),
        ({"logit_bias": [(100, 1.0)]}, "logit_bias contains 100"),
        ({"logit_bias": [(1, float("nan"))]}, "logit_bias of token 1 is nan"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids contains 2147483648"),
        ({"logit_bias": [(2**64, 1.0)]}, "logit_bias is 18446744073709551616"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids contains -1"),
        ({"banned_token_ids": list(range(100))}, "leave no token to pick"),
    ],
)
def test_parameters_out_of_range_are_value_errors_with_the_numbers(fields: dict[str, Any], message: str) -> None:
    """ADV-22, ADV-24."""
    m = Machine(config())
    with pytest.raises(ValueError, match=message):
        m.core.add(1, tokens(5), **fields)
    assert m.core.idle


def test_a_prompt_too_long_is_refused_with_both_numbers() -> None:
    m = Machine(config())
    with pytest.raises(ValueError, match=r"maximum context length is 128 tokens.*prompt contains 128 tokens"):
        m.core.add(1, tokens(128))
    with pytest.raises(ValueError, match="prompt is empty"):
        m.core.add(1, tokens(0))


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(3, np.int64),
        np.zeros(3, np.float32),
        np.zeros(3, np.uint32),
        np.zeros((2, 2), np.int32),
        np.zeros(6, np.int32)[::2],
        np.zeros(3, ">i4"),
        b"abcd",
    ],
    ids=["i64", "f32", "u32", "2d", "strided", "big_endian", "bytes"],
)
def test_token_buffers_of_another_shape_or_type_are_refused(bad: Any) -> None:
    m = Machine(config())
    with pytest.raises(ValueError, match="tokens must be"):
        m.core.add(1, bad)
    m.core.add(1, tokens(3))
    batch = m.core.schedule()
    assert batch is not None
    with pytest.raises(ValueError, match="tokens must be"):
        m.core.commit(batch.step, bad)


def test_any_integer_type_is_an_integer_and_any_seed_a_seed() -> None:
    m = Machine(config())
    any_integer: Any = np.int64(1)
    m.core.add(1, tokens(3), max_tokens=2, n=any_integer, seed=-5)
    m.core.add(2, tokens(3), seed=2**64 - 1)
    batch = m.core.schedule()
    assert batch is not None
    assert m.column(batch, "seeds", 2).tolist() == [-5, -1]
    with pytest.raises(TypeError):
        m.core.add(3, tokens(3), max_tokens=1.5)  # type: ignore[arg-type]


def test_abort_takes_ids_and_ignores_unknown_ones() -> None:
    """B11."""
    m = Machine(config())
    m.core.add(10, tokens(3), n=3)
    assert m.core.abort(np.array([10, 11, 99], np.uint64)) == 2
    assert set(m.run()) == {12}
    with pytest.raises(ValueError, match="ids must be one-dimensional uint64"):
        m.core.abort(np.array([1], np.int32))


def test_a_step_out_of_order_is_refused_and_changes_nothing() -> None:
    m = Machine(config(depth=2))
    m.core.add(1, tokens(3), max_tokens=4)
    first, second = m.core.schedule(), m.core.schedule()
    assert first is not None
    assert second is not None
    assert m.core.schedule() is None
    with pytest.raises(ValueError, match="step 1 is committed, but the oldest in flight is 0"):
        m.core.commit(second.step, m.pick(second))
    assert m.column(second, "token_ids", 1).tolist() == [-1]
    m.core.commit(first.step, m.pick(first))
    m.core.commit(second.step, m.pick(second))
    assert m.run() == {1: [5, 6]}


def test_prefixes_are_found_until_they_are_forgotten() -> None:
    """B1."""
    m = Machine(config())

    def cached(request: int, salt: bytes = b"") -> int:
        m.core.add(request, tokens(20), max_tokens=1, cache_salt=salt)
        batch = m.core.schedule()
        assert batch is not None
        return int(m.core.commit(batch.step, m.pick(batch)).cached_tokens[0])

    assert [cached(1), cached(2), cached(3, b"other"), cached(4, b"other")] == [0, 16, 0, 16]
    assert m.core.forget_prefixes()
    assert cached(5) == 0


def test_another_thread_at_the_same_time_is_an_error_not_a_race() -> None:
    """The scheduler has one owner. Both threads count how often they were turned away; nothing else may go wrong."""
    m = Machine(config(max_model_len=100))
    failures: list[str] = []

    def use() -> None:
        for i in range(300):
            try:
                m.core.stats()
                m.core.abort(np.array([i], np.uint64))
            except RuntimeError as error:
                failures.append(str(error))

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(failures) <= {"the scheduler is in use by another thread"}
    m.core.check_invariants()


def test_the_stub_and_the_module_have_the_same_names() -> None:
    stub = ast.parse((Path(_core.__file__).parent / "_core.pyi").read_text())
    names = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert names == {name for name in dir(_core) if not name.startswith("_")}
    for node in stub.body:
        if not isinstance(node, ast.ClassDef):
            continue
        members = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        members |= {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
        actual = {name for name in dir(getattr(_core, node.name)) if not name.startswith("_")}
        assert members - {"__init__"} == actual, node.name


def test_the_stub_and_the_module_have_the_same_parameters_and_defaults() -> None:
    stub = ast.parse((Path(_core.__file__).parent / "_core.pyi").read_text())
    for node in stub.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if not isinstance(item, ast.FunctionDef) or item.decorator_list:
                continue
            signature = (inspect.getdoc(getattr(getattr(_core, node.name), item.name)) or "").splitlines()[0]
            for argument in item.args.args[1:] + item.args.kwonlyargs:
                assert f"{argument.arg}:" in signature, (item.name, argument.arg)
            for argument, default in zip(item.args.kwonlyargs, item.args.kw_defaults, strict=True):
                if isinstance(default, ast.Constant):
                    written = signature.split(f"{argument.arg}: ", 1)[1].split(", ")[0]
                    assert written.removesuffix(") -> None").endswith(f" = {default.value!r}"), argument.arg
