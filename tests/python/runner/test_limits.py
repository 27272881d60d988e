"""The plan of the memory: what the user set is kept or refused, what was left open is fitted (P3, S50)."""

from __future__ import annotations

import random
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


def plan(spec: ModelSpec, free: int = 10 * GIB, machine: Machine = CPU, host: int = 0, **options: Any) -> MemoryPlan:
    found = config(**options)
    return plan_memory(found, ModelSizes.of(found, spec), machine, free, host)


def refused(
    spec: ModelSpec, free: int = 10 * GIB, machine: Machine = CPU, host: int = 0, num_fixes: int = 2, **settings: Any
) -> StartupFailure:
    """Also takes each of the fixes, as a command line has it, and sees that it helps."""
    with pytest.raises(StartupError) as caught:
        plan(spec, free, machine, host, **settings)
    failure = caught.value.failure
    assert (failure.code, failure.exit_code) == ("HS-E026", 12)
    fixes = [fix for fix in failure.fix.split(", or ") if fix.startswith("--")]
    assert len(set(fixes)) == num_fixes, failure.fix
    for fix in fixes:
        parsed = options.parse(["m", *fix.split()], {})
        said = {name: value for group in vars(parsed.config).values() for name, value in vars(group).items()}
        changed = settings | {name: said[name] for name in parsed.origins if name != "model"}
        share = changed.get("gpu_memory_utilization", 0.9) - settings.get("gpu_memory_utilization", 0.9)
        there = (host, CPU) if changed.get("device") == "cpu" else (free + int(share * machine.total_bytes), machine)
        plan(spec, *there, **changed)
        tokens, seqs = changed.get("max_num_batched_tokens", 0), changed.get("max_num_seqs", 0)
        assert not 0 < tokens < seqs, f"the core refuses {fix}"
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
    assert failure.fix == "--max-num-seqs 512, or --max-num-batched-tokens 2048 --max-num-seqs 1024"
    failure = refused(spec, 1400 * MIB, CUDA, max_num_seqs=256, max_num_batched_tokens=65_536)
    assert re.match(r"--max-num-batched-tokens \d+, or --max-num-batched-tokens ", failure.fix)
    both = refused(spec, 2 * GIB, CUDA._replace(total_bytes=8 * GIB), gpu_memory_utilization=0.5, max_num_seqs=2048)
    assert re.fullmatch(r"--gpu-memory-utilization 0\.\d+, or --max-num-seqs \d+", both.fix)


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
    check_swap_space(config(swap_space=7), CUDA, 8 * GIB)
    check_swap_space(config(swap_space=12), CPU, 8 * GIB)  # the plan has it
    for wanted, free, fix in ((12, 8 * GIB, "--swap-space 7.2, or --swap-space 0"), (1, 90 * MIB, "--swap-space 0")):
        with pytest.raises(StartupError, match=f"{wanted} GiB does not fit") as caught:
            check_swap_space(config(swap_space=wanted), CUDA, free)
        assert caught.value.failure.fix == fix
        for flag in fix.split(", or "):
            check_swap_space(config(swap_space=float(flag.split()[1])), CUDA, free)


def test_whether_to_swap_or_to_compute_again_follows_from_the_rates(spec: ModelSpec) -> None:
    """P17: by the rates that were measured, for a block of 16 tokens."""
    shape: Any = {"hidden_size": 4096, "num_heads": 32, "head_dim": 128, "intermediate_size": 14336}
    of_8b = ModelSizes.of(Config(), replace(spec, **shape))
    assert of_8b.swap_cost(Config(), CUDA) == 4
    assert of_8b.swap_cost(Config(), CPU) == 1
    # A small model with as many KV heads as query heads: its keys and values are more than its weights are worth.
    assert ModelSizes.of(Config(), spec).swap_cost(Config(), CUDA) > 16


def test_a_model_that_does_not_fit_is_refused(spec: ModelSpec) -> None:
    failure = refused(spec, 100 * MIB, num_fixes=0)
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


@pytest.fixture(scope="module")
def of_8b(spec: ModelSpec) -> ModelSpec:
    """15 GiB of weights in 16 bits, 128 KiB of cache a token."""
    sizes = {"num_heads": 32, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 14336}
    changed: Any = sizes | {"vocab_size": 128_256, "max_position": 131_072}
    return replace(spec, **changed)


def gpu(gib: int) -> Machine:
    return CUDA._replace(total_bytes=gib * GIB)


# Of a small model of 0.4 GiB with a context of 1600 tokens on a CPU, and of one of 8B on a GPU: what was asked for,
# what does not fit, and the first word of each fix.
REFUSALS_ON_A_CPU: list[tuple[int, dict[str, Any], str, list[str]]] = [
    (1200, {"dtype": "float32", "max_model_len": 1600}, "KV cache is too small", ["--max-model-len", "--dtype"]),
    (1200, {"kv_cache_memory_bytes": 4 * GIB}, "a KV cache of 4096 MiB", ["--kv-cache-memory-bytes"] * 2),
    (1200, {"kv_cache_memory_bytes": MIB}, "KV cache is too small", ["--kv-cache-memory-bytes", "--max-model-len"]),
    (1200, {"num_gpu_blocks_override": 9000}, "a KV cache of 9000 MiB", ["--num-gpu-blocks-override"] * 2),
    (1200, {"num_gpu_blocks_override": 3}, "KV cache is too small", ["--num-gpu-blocks-override", "--max-model-len"]),
    (560, {"max_model_len": 1600}, "KV cache is too small", ["--max-model-len", "--kv-cache-memory-bytes"]),
    (1200, {"swap_space": 4.0}, "the model does not fit", ["--swap-space"] * 2),
    (1200, {"max_num_seqs": 4096}, "4096 requests", ["--max-num-seqs"] * 2),
    (1200, {"max_num_batched_tokens": 100_000}, "steps of 100000 tokens", ["--max-num-batched-tokens"] * 2),
    (
        1200,
        {"max_num_seqs": 5000, "max_num_batched_tokens": 100_000, "max_model_len": 1600, "swap_space": 4.0},
        "the model does not fit",
        ["--swap-space", "--max-model-len"],
    ),
]
REFUSALS_ON_A_GPU: list[tuple[int, int, dict[str, Any], str, list[str]]] = [
    (24, 64, {"max_model_len": 131_072}, "KV cache is too small", ["--max-model-len"] * 2),
    (24, 0, {"max_model_len": 131_072}, "KV cache is too small", ["--max-model-len"] * 2),
    (16, 64, {}, "the model does not fit", ["--gpu-memory-utilization", "--max-model-len"]),
    (80, 0, {"gpu_memory_utilization": 0.15}, "the model does not fit", ["--gpu-memory-utilization"] * 2),
    (80, 0, {"num_gpu_blocks_override": 10**6}, "a KV cache of 2000000 MiB", ["--num-gpu-blocks-override"] * 2),
    (80, 0, {"kv_cache_memory_bytes": 200 * GIB}, "a KV cache of 204800 MiB", ["--kv-cache-memory-bytes"] * 2),
    (
        24,
        0,
        {"kv_cache_memory_bytes": 99 * GIB, "max_model_len": 131_072},
        "a KV cache",
        ["--kv-cache-memory-bytes"] * 2,
    ),
    (80, 0, {"max_num_seqs": 60_000}, "60000 requests", ["--max-num-seqs", "--enforce-eager"]),
    (24, 0, {"max_num_seqs": 8192, "max_num_batched_tokens": 65_536}, "steps", ["--max-num-batched-tokens"] * 2),
    (
        24,
        0,
        {"max_num_seqs": 8192, "max_num_batched_tokens": 65_536, "max_model_len": 131_072, "swap_space": 1.0}
        | {"kv_cache_memory_bytes": 30 * GIB},
        "steps",
        ["--kv-cache-memory-bytes"] * 2,
    ),
]


@pytest.mark.parametrize(("mib", "settings", "what", "flags"), REFUSALS_ON_A_CPU)
def test_every_refusal_on_a_cpu_names_two_changes_that_fit(
    spec: ModelSpec, mib: int, settings: dict[str, Any], what: str, flags: list[str]
) -> None:
    """P3."""
    failure = refused(spec, mib * MIB, **settings)
    assert what in failure.what
    assert [fix.split()[0] for fix in failure.fix.split(", or ")] == flags, failure.fix


@pytest.mark.parametrize(("gib", "host_gib", "settings", "what", "flags"), REFUSALS_ON_A_GPU)
def test_every_refusal_on_a_gpu_names_two_changes_that_fit(
    of_8b: ModelSpec, gib: int, host_gib: int, settings: dict[str, Any], what: str, flags: list[str]
) -> None:
    """P3."""
    free = int(settings.get("gpu_memory_utilization", 0.9) * gib * GIB)
    failure = refused(of_8b, free, gpu(gib), host_gib * GIB, **settings)
    assert what in failure.what
    assert [fix.split()[0] for fix in failure.fix.split(", or ")] == flags, failure.fix


def test_what_no_option_makes_fit_needs_another_model_or_machine(of_8b: ModelSpec) -> None:
    assert "a smaller model" in refused(of_8b, 7 * GIB, gpu(8), num_fixes=0).fix
    assert refused(of_8b, 7 * GIB, gpu(8), 64 * GIB, num_fixes=1).fix == "--device cpu"


def test_whatever_was_asked_for_a_refusal_helps(spec: ModelSpec) -> None:
    """P3: random options on random machines; where there is room for the model and a small cache, two changes."""
    dice, num_refused = random.Random(7), 0
    choices: dict[str, list[Any]] = {
        "max_num_seqs": [1, 16, 300, 5000],
        "max_num_batched_tokens": [5000, 100_000],
        "max_model_len": [300, 9000, 131_072],
        "kv_cache_memory_bytes": [MIB, 300 * MIB, 20 * GIB],
        "swap_space": [0.5, 30.0],
        "enforce_eager": [True],
        "block_size": [64],
    }
    long = replace(spec, max_position=131_072)
    for _ in range(40):
        settings = {name: dice.choice(values) for name, values in choices.items() if dice.random() < 0.4}
        machine, total = dice.choice([CPU, CUDA, gpu(4)]), dice.randint(1200, 3600) * MIB
        try:
            plan(long, total, machine, **settings)
        except StartupError:
            num_refused += 1
            refused(long, total, machine, **settings)
    assert num_refused > 15
