"""The cache plan: what the user set is kept or refused, what was left open is fitted (P3, S50)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybrid_serve.checkpoint.hf_spec import spec_of_folder
from hybrid_serve.config import CacheConfig
from hybrid_serve.errors import StartupError
from hybrid_serve.runner.limits import MIB, MemoryPlan, check_weights_fit, longest_context, plan_memory
from hybrid_serve.wire import StartupFailure
from tiny_models import make_tiny_model

BLOCK = MIB  # of 16 tokens


def plan(cache: CacheConfig | None = None, **changes: Any) -> MemoryPlan:
    arguments: dict[str, Any] = {
        "weight_bytes": 300 * MIB,
        "activation_bytes": 50 * MIB,
        "block_bytes": BLOCK,
        "max_model_len": 1600,
        "is_length_fixed": False,
        "max_num_seqs": 256,
        "free_bytes": 10_000 * MIB,
    }
    return plan_memory(cache or CacheConfig(), **(arguments | changes))


def refused(cache: CacheConfig | None = None, **changes: Any) -> StartupFailure:
    with pytest.raises(StartupError) as caught:
        plan(cache, **changes)
    assert (caught.value.failure.code, caught.value.failure.exit_code) == ("HS-E026", 12)
    return caught.value.failure


def test_the_default_holds_four_full_contexts() -> None:
    found = plan()
    assert (found.num_blocks, found.max_model_len, found.notes) == (400, 1600, ())


def test_the_default_is_at_least_256_mib_but_no_more_than_the_sequences_can_use() -> None:
    assert plan(max_model_len=160).num_blocks == 256
    assert plan(max_model_len=160, max_num_seqs=2).num_blocks == 20


def test_where_there_is_a_budget_the_default_takes_all_of_it() -> None:
    assert plan(cache_budget=7000 * MIB).num_blocks == 7000


def test_the_rows_say_where_the_memory_goes() -> None:
    rows = plan(cache_budget=7000 * MIB).rows
    assert [num_bytes // MIB for _, num_bytes in rows] == [300, 50, 7000, 3000]


def test_the_default_takes_a_part_of_the_free_memory_and_says_so() -> None:
    found = plan(free_bytes=500 * MIB)
    assert (found.num_blocks, found.max_model_len) == (200, 1600)
    assert "200 MiB" in found.notes[0]


def test_a_context_left_open_shrinks_to_what_fits_and_says_so() -> None:
    found = plan(free_bytes=100 * MIB)
    assert (found.num_blocks, found.max_model_len) == (40, 640)
    assert any("640 of 1600" in note for note in found.notes)


def test_a_context_that_was_asked_for_is_never_shortened() -> None:
    failure = refused(is_length_fixed=True, free_bytes=100 * MIB)
    assert "100 MiB" in failure.why
    assert "--kv-cache-memory-bytes 100MiB" in failure.fix
    assert "--max-model-len 640" in failure.fix


def test_a_cache_that_was_asked_for_is_kept_to_the_block() -> None:
    assert plan(CacheConfig(num_gpu_blocks_override=123)).num_blocks == 123
    assert plan(CacheConfig(kv_cache_memory_bytes=150 * MIB + 5)).num_blocks == 150
    small = plan(CacheConfig(kv_cache_memory_bytes=50 * MIB))
    assert (small.num_blocks, small.max_model_len) == (50, 800)


def test_a_cache_larger_than_the_free_memory_is_refused_with_the_numbers() -> None:
    failure = refused(CacheConfig(kv_cache_memory_bytes=20_000 * MIB))
    assert "20000 MiB" in failure.what
    assert "10000 MiB" in failure.why
    assert "--kv-cache-memory-bytes" in failure.fix
    assert "--max-model-len" in failure.fix


def test_a_machine_with_no_room_at_all_is_refused() -> None:
    refused(free_bytes=10 * MIB)
    with pytest.raises(StartupError) as caught:
        check_weights_fit(300 * MIB, 200 * MIB)
    assert caught.value.failure.exit_code == 12
    assert "300 MiB" in caught.value.failure.why


def test_the_context_ends_where_positions_or_the_sliding_window_end(tmp_path: Path) -> None:
    plain = spec_of_folder(make_tiny_model(tmp_path, max_position_embeddings=512))
    assert (longest_context(plain, 0), longest_context(plain, 100)) == (512, 100)
    with pytest.raises(StartupError, match="600") as caught:
        longest_context(plain, 600)
    assert (caught.value.failure.exit_code, "--max-model-len 512" in caught.value.failure.fix) == (2, True)
    windowed = spec_of_folder(make_tiny_model(tmp_path, "mistral", sliding_window=128))
    assert longest_context(windowed, 0) == 128
    with pytest.raises(StartupError) as caught:
        longest_context(windowed, 129)
    assert "window" in caught.value.failure.why


def test_yarn_extends_the_context_by_its_factor(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    spec = spec_of_folder(make_tiny_model(tmp_path, rope_scaling=scaling))
    assert longest_context(spec, 0) == 2048
