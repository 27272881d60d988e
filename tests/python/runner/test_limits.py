"""The plan of the memory: what the user set is kept or refused, what was left open is fitted (P3, S50)."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from hybrid_serve.checkpoint.hf_spec import spec_of_folder
from hybrid_serve.checkpoint.model_spec import ModelSpec
from hybrid_serve.cli import options
from hybrid_serve.config import Config
from hybrid_serve.errors import StartupError
from hybrid_serve.runner.limits import MIB, MemoryPlan, check_swap_space, plan_memory
from hybrid_serve.runner.sizes import CPU, CUDA, Machine, ModelSizes, longest_context
from hybrid_serve.wire import StartupFailure
from tiny_models import make_tiny_model

GIB = 2**30


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """In 16 bits: 64 KiB of cache a token, hence a block of 16 is 1 MiB; 0.4 GiB of weights."""
    tiny = spec_of_folder(make_tiny_model(tmp_path_factory.mktemp("tiny")))
    sizes = {"num_layers": 32, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "hidden_size": 512}
    changed: Any = sizes | {"intermediate_size": 1536, "vocab_size": 150_000, "max_position": 1600, "dtype": "bfloat16"}
    return replace(tiny, **changed)


def config(**options: Any) -> Config:
    found = Config()
    for group in fields(found):
        old = getattr(found, group.name)
        chosen = {one.name: options.pop(one.name) for one in fields(old) if one.name in options}
        found = replace(found, **{group.name: replace(old, **chosen)})
    assert not options
    return found


def plan(spec: ModelSpec, free: int = 10 * GIB, machine: Machine = CPU, **options: Any) -> MemoryPlan:
    found = config(**options)
    return plan_memory(found, ModelSizes.of(found, spec), machine, free)


def refused(spec: ModelSpec, free: int = 10 * GIB, machine: Machine = CPU, **settings: Any) -> StartupFailure:
    """Also takes every flag of the fix, one at a time, and sees that it helps."""
    with pytest.raises(StartupError) as caught:
        plan(spec, free, machine, **settings)
    failure = caught.value.failure
    assert (failure.code, failure.exit_code) == ("HS-E026", 12)
    for flag in failure.fix.split(", or "):
        if flag.startswith("--"):
            name = flag.split()[0][2:].replace("-", "_")
            value = options.parse(["m", *flag.split()], {}).config
            changed = settings | {name: next(vars(g)[name] for g in vars(value).values() if name in vars(g))}
            share = changed.get("gpu_memory_utilization", 0.9) - settings.get("gpu_memory_utilization", 0.9)
            plan(spec, free + int(share * machine.total_bytes), machine, **changed)
    return failure


def test_the_default_holds_four_full_contexts(spec: ModelSpec) -> None:
    found = plan(spec)
    assert (found.num_blocks, found.max_model_len, found.notes) == (400, 1600, ())
    assert (found.max_num_seqs, found.max_batched_tokens, found.pad_sizes.num_shapes) == (256, 512, 0)


def test_the_default_is_at_least_256_mib_but_no_more_than_the_sequences_can_use(spec: ModelSpec) -> None:
    assert plan(spec, max_model_len=160).num_blocks == 256
    assert plan(spec, max_model_len=160, max_num_seqs=2).num_blocks == 20


def test_a_gpus_cache_takes_all_that_is_left(spec: ModelSpec) -> None:
    found = plan(spec, 30 * GIB, CUDA)
    assert found.num_blocks == (sum(num_bytes for _, num_bytes in found.rows[-2:])) // MIB
    assert (found.max_num_seqs, found.max_batched_tokens) == (256, 8192)
    assert found.pad_sizes.mixed_tokens[-1] == 2048
    assert found.notes == ()


@pytest.mark.parametrize("machine", [CPU, CUDA])
def test_the_rows_add_up_to_the_free_memory(spec: ModelSpec, machine: Machine) -> None:
    for free in (2 * GIB, 10 * GIB + 12345):
        assert sum(num_bytes for _, num_bytes in plan(spec, free, machine).rows) == free
    names = " ".join(name for name, _ in plan(spec, machine=CUDA).rows)
    for part in ("weights", "positions", "step", "workspaces", "graphs", "batches", "KV cache", "left free"):
        assert part in names
    assert "graphs" not in " ".join(name for name, _ in plan(spec, machine=CUDA, enforce_eager=True).rows)


def test_the_default_takes_a_part_of_the_free_memory_and_says_so(spec: ModelSpec) -> None:
    found = plan(spec, 1200 * MIB)
    assert found.max_model_len == 1600
    assert f"KV cache limited to {found.num_blocks} MiB, 40%" in found.notes[0]


def test_what_was_left_open_shrinks_on_a_small_gpu_and_says_so(spec: ModelSpec) -> None:
    """P3: a GPU with 2 GB free."""
    long = replace(spec, max_position=131_072)
    found = plan(long, 2 * GIB, CUDA)
    assert found.max_num_seqs < 256
    assert found.max_batched_tokens < 8192
    assert found.pad_sizes.mixed_tokens[-1] < 2048
    assert 1600 < found.max_model_len < 131_072
    steps, context = found.notes
    assert f"max_num_seqs {found.max_num_seqs} instead of 256" in steps
    assert f"max_num_batched_tokens {found.max_batched_tokens} instead of 8192" in steps
    assert f"context limited to {found.max_model_len} of 131072" in context


def test_less_memory_never_fits_more(spec: ModelSpec) -> None:
    last = plan(spec, 64 * GIB, CUDA)
    for free in range(8 * GIB, 1200 * MIB, -200 * MIB):
        found = plan(spec, free, CUDA)
        assert found.max_num_seqs <= last.max_num_seqs
        assert found.max_batched_tokens <= last.max_batched_tokens
        assert found.max_batched_tokens >= found.max_num_seqs
        last = found


def test_what_the_user_set_is_never_shrunk(spec: ModelSpec) -> None:
    found = plan(spec, 3 * GIB, CUDA, max_num_seqs=256, max_num_batched_tokens=8192)
    assert (found.max_num_seqs, found.max_batched_tokens) == (256, 8192)
    failure = refused(spec, 2 * GIB, CUDA, max_num_seqs=2048, max_num_batched_tokens=8192)
    assert "8192 tokens and 2048 requests" in failure.what
    assert failure.fix == "--max-num-seqs 512"
    failure = refused(spec, 1400 * MIB, CUDA, max_num_seqs=256, max_num_batched_tokens=65_536)
    assert re.fullmatch(r"--max-num-batched-tokens \d+", failure.fix)
    both = refused(spec, 2 * GIB, CUDA._replace(total_bytes=8 * GIB), gpu_memory_utilization=0.5, max_num_seqs=2048)
    assert re.fullmatch(r"--gpu-memory-utilization 0\.\d\d, or --max-num-seqs \d+", both.fix)


def test_fewer_tokens_a_step_than_the_default_of_requests_are_fewer_requests(spec: ModelSpec) -> None:
    assert plan(spec, max_num_batched_tokens=100).max_num_seqs == 100


def test_a_context_left_open_shrinks_to_what_fits_and_says_so(spec: ModelSpec) -> None:
    found = plan(spec, kv_cache_memory_bytes=50 * MIB)
    assert (found.num_blocks, found.max_model_len) == (50, 800)
    assert any("800 of 1600" in note for note in found.notes)


def test_a_context_that_was_asked_for_is_never_shortened(spec: ModelSpec) -> None:
    """P3: two flags, with values, of which each makes it fit."""
    failure = refused(spec, max_model_len=1600, kv_cache_memory_bytes=40 * MIB)
    assert "100 MiB" in failure.why
    assert failure.fix == "--kv-cache-memory-bytes 100MiB, or --max-model-len 640"
    failure = refused(replace(spec, max_position=131_072), 2 * GIB, CUDA, max_model_len=131_072)
    assert re.search(r"--max-model-len \d+", failure.fix)


def test_a_cache_in_fp8_has_twice_the_blocks(spec: ModelSpec) -> None:  # S54, P3
    size: dict[str, Any] = {"kv_cache_memory_bytes": GIB}
    assert [plan(spec, kv_cache_dtype=kind, **size).num_blocks for kind in ("auto", "fp8")] == [1024, 2048]
    on_gpu = [plan(spec, machine=CUDA, kv_cache_dtype=kind).num_blocks for kind in ("auto", "fp8")]
    assert on_gpu[1] in (2 * on_gpu[0], 2 * on_gpu[0] + 1)


def test_a_context_that_is_too_long_for_16_bits_and_not_for_8_is_told_so(spec: ModelSpec) -> None:
    needed = 1600 * 65536  # of cache, in 16 bits
    settings: dict[str, Any] = {"max_model_len": 1600, "kv_cache_memory_bytes": needed * 3 // 4}
    assert plan(spec, kv_cache_dtype="fp8", **settings).max_model_len == 1600
    settings |= {"max_num_seqs": 1, "max_num_batched_tokens": 256}
    model = ModelSizes.of(config(**settings), spec)
    assert "--kv-cache-dtype fp8" in refused(spec, int(model.weight_bytes + needed * 0.9), **settings).fix


def test_a_share_of_the_gpu_that_was_too_small_is_among_the_fixes(spec: ModelSpec) -> None:
    machine = CUDA._replace(total_bytes=24 * GIB)
    failure = refused(
        spec, int(0.3 * 24 * GIB), machine, gpu_memory_utilization=0.3, max_model_len=1600, max_num_seqs=8192
    )
    assert "--gpu-memory-utilization 0." in failure.fix


def test_a_cache_that_was_asked_for_is_kept_to_the_block(spec: ModelSpec) -> None:
    assert plan(spec, num_gpu_blocks_override=123).num_blocks == 123
    assert plan(spec, kv_cache_memory_bytes=150 * MIB + 5).num_blocks == 150


def test_a_cache_larger_than_the_free_memory_is_refused_with_the_numbers(spec: ModelSpec) -> None:
    failure = refused(spec, kv_cache_memory_bytes=20_000 * MIB)
    assert "20000 MiB" in failure.what
    assert "are free" in failure.why
    assert "--kv-cache-memory-bytes" in failure.fix
    assert "--num-gpu-blocks-override" in refused(spec, num_gpu_blocks_override=20_000).fix


def test_a_swap_space_is_part_of_the_hosts_memory_and_not_of_a_gpus(spec: ModelSpec) -> None:  # S47
    found = plan(spec, swap_space=1.5)
    assert found.num_host_blocks == 1536
    assert dict(found.rows)["swap space"] == 1.5 * GIB
    assert sum(num_bytes for _, num_bytes in found.rows) == 10 * GIB
    on_gpu = plan(spec, machine=CUDA, swap_space=100)
    assert on_gpu.num_host_blocks == 102_400
    assert "swap space" not in dict(on_gpu.rows)
    sizes = ModelSizes.of(Config(), spec)
    check_swap_space(config(swap_space=7), sizes, 8 * GIB)
    with pytest.raises(StartupError, match="12 GiB does not fit") as caught:
        check_swap_space(config(swap_space=12), sizes, 8 * GIB)
    assert "--swap-space 7.2" in caught.value.failure.fix


def test_whether_to_swap_or_to_compute_again_follows_from_the_rates(spec: ModelSpec) -> None:
    """P17: by the rates that were measured, for a block of 16 tokens."""
    shape: Any = {"hidden_size": 4096, "num_heads": 32, "head_dim": 128, "intermediate_size": 14336}
    of_8b = ModelSizes.of(Config(), replace(spec, **shape))
    assert of_8b.swap_cost(Config(), CUDA) == 4
    assert of_8b.swap_cost(Config(), CPU) == 1
    # A small model with as many KV heads as query heads: its keys and values are more than its weights are worth.
    assert ModelSizes.of(Config(), spec).swap_cost(Config(), CUDA) > 16


def test_a_model_that_does_not_fit_is_refused(spec: ModelSpec) -> None:
    failure = refused(spec, 100 * MIB)
    assert "the model does not fit" in failure.what
    assert "100 MiB are free" in failure.why
    assert "a smaller model" in failure.fix
    assert "--dtype bfloat16" in refused(spec, 1200 * MIB, dtype="float32", max_model_len=1600).fix


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
