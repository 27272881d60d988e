"""ModelRunner: loading, dummy weights, and the parts of a step beside the model (late token ids, copies, logprobs)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_serve.checkpoint.hub import resolve
from hybrid_serve.config import CacheConfig, Config, EngineConfig, ModelConfig
from hybrid_serve.engine.executor import InlineExecutor
from hybrid_serve.errors import StartupError
from hybrid_serve.runner.arena import NUM_DECODES, ArenaViews
from hybrid_serve.runner.device import open_device
from hybrid_serve.runner.model_runner import ModelRunner
from in_process import Generator, load_runner
from tiny_gguf import write_tiny_gguf
from tiny_models import FAMILIES, make_tiny_model

PROMPT = [5, 9, 300, 41, 77, 8]
# Columns of an arena by hand: one sequence in two blocks is all these tests need.
COLUMNS = {
    "header": "<i8", "token_ids": "<i4", "positions": "<i4", "slots": "<i8", "query_start": "<i4", "seq_lens": "<i4",
    "sample_rows": "<i4", "temperature": "<f4", "top_p": "<f4", "min_p": "<f4", "repetition_penalty": "<f4",
    "top_k": "<i4", "num_logprobs": "<i4", "seeds": "<i8", "sample_positions": "<i4", "adjust_start": "<i4",
    "copy_src": "<i4", "copy_dst": "<i4", "kv_start": "<i4", "kv_blocks": "<i4", "adjustments": "<i4",
    "swap_src": "<i4", "swap_dst": "<i4",
}  # fmt: skip
CAPACITY = 32
LAYOUT = {name: (index * 256, dtype, CAPACITY) for index, (name, dtype) in enumerate(COLUMNS.items())}
ARENA_BYTES = len(COLUMNS) * 256


class OneSequence:
    """Writes batches of one sequence, as the scheduler would, into one arena."""

    def __init__(self, runner: ModelRunner, blocks: list[int]) -> None:
        self.runner, self.blocks = runner, blocks
        arena = bytearray(ARENA_BYTES)
        runner.bind([arena], LAYOUT)
        self.columns = ArenaViews(arena, LAYOUT).arrays
        self.computed = 0

    def step(
        self,
        token_ids: list[int],
        copies: list[tuple[int, int]] | None = None,
        num_logprobs: int = -1,
        swap_outs: list[tuple[int, int]] | None = None,
        swap_ins: list[tuple[int, int]] | None = None,
    ) -> Any:
        count, columns = len(token_ids), self.columns
        positions = np.arange(self.computed, self.computed + count)
        self.computed += count
        columns["token_ids"][:count] = token_ids
        columns["positions"][:count] = positions
        columns["slots"][:count] = [self.blocks[at // 16] * 16 + at % 16 for at in positions]
        columns["header"][NUM_DECODES] = int(count == 1)
        columns["query_start"][:2] = [0, count]
        columns["seq_lens"][0] = self.computed
        columns["sample_rows"][0] = count - 1
        columns["temperature"][0], columns["top_p"][0], columns["repetition_penalty"][0] = 0.0, 1.0, 1.0
        columns["num_logprobs"][0] = num_logprobs
        columns["sample_positions"][0] = self.computed
        columns["kv_start"][:2] = [0, -(-self.computed // 16)]
        columns["kv_blocks"][: len(self.blocks)] = self.blocks
        for index, (source, target) in enumerate(copies or []):
            columns["copy_src"][index], columns["copy_dst"][index] = source, target
        for index, (source, target) in enumerate([*(swap_outs or []), *(swap_ins or [])]):
            columns["swap_src"][index], columns["swap_dst"][index] = source, target
        return self.runner.step(
            SimpleNamespace(
                step=0,
                arena=0,
                num_tokens=count,
                num_seqs=1,
                num_decodes=int(count == 1),
                num_sampled=1,
                max_query_len=count,
                num_copies=len(copies or []),
                num_prefixes=0,
                num_swap_outs=len(swap_outs or []),
                num_swap_ins=len(swap_ins or []),
                num_adjustments=0,
            )
        )


@pytest.fixture
def runner(tmp_path: Path) -> ModelRunner:
    runner = load_runner(make_tiny_model(tmp_path))
    runner.allocate(8, 4)
    return runner


def test_facts_say_what_the_files_say(tmp_path: Path) -> None:
    facts = load_runner(make_tiny_model(tmp_path)).facts
    assert (facts.vocab_size, facts.max_model_len, facts.eos_token_ids, facts.dtype) == (512, 512, (2,), "float32")
    assert facts.block_bytes == 2 * 2 * 2 * 16 * 16 * 4  # K and V, layers, KV heads, tokens, head size, bytes
    assert facts.device.startswith("cpu (")


def test_a_late_token_id_stands_for_what_the_previous_step_sampled(runner: ModelRunner) -> None:
    first = OneSequence(runner, [3, 5])
    sampled = int(first.step(PROMPT).tokens[0])
    expected = first.step([sampled]).tokens.tolist()
    again = OneSequence(runner, [1, 2])
    again.step(PROMPT)
    assert again.step([-1]).tokens.tolist() == expected


def test_blocks_are_copied_before_the_step_reads_them(runner: ModelRunner) -> None:
    first = OneSequence(runner, [3, 5])
    sampled = int(first.step(PROMPT).tokens[0])
    expected = first.step([sampled]).tokens.tolist()
    fork = OneSequence(runner, [6, 7])
    fork.computed = len(PROMPT)
    assert fork.step([sampled], copies=[(3, 6), (5, 7)]).tokens.tolist() == expected


def test_blocks_go_to_the_host_before_a_step_writes_and_come_back_before_it_copies_and_reads(
    runner: ModelRunner,
) -> None:  # S47
    first = OneSequence(runner, [3, 5])
    sampled = int(first.step(PROMPT).tokens[0])
    expected = first.step([sampled]).tokens.tolist()
    OneSequence(runner, [3, 5]).step(PROMPT[::-1], swap_outs=[(5, 1), (3, 2)])  # writes over what it swaps out
    back = OneSequence(runner, [0, 7])
    back.computed = len(PROMPT)
    assert back.step([sampled], swap_ins=[(2, 0), (1, 7)]).tokens.tolist() == expected
    fork = OneSequence(runner, [6, 4])
    fork.computed = len(PROMPT)
    assert fork.step([sampled], copies=[(1, 6), (2, 4)], swap_ins=[(2, 1), (1, 2)]).tokens.tolist() == expected


def test_logprobs_come_as_wide_as_the_most_that_a_row_asked_for(runner: ModelRunner) -> None:
    sequence = OneSequence(runner, [3, 5])
    assert sequence.step(PROMPT).logprobs is None
    result = sequence.step([1], num_logprobs=3)
    assert result.logprobs.shape == result.logprob_ids.shape == (1, 4)
    assert result.logprob_ids[0, 0] == result.logprob_ids[0, 1] == result.tokens[0]
    assert result.ranks.tolist() == [1]
    assert np.all(np.diff(result.logprobs[0, 1:]) <= 0)
    assert np.exp(result.logprobs[0, 1:]).sum() <= 1.0
    assert sequence.step([1], num_logprobs=0).logprobs.shape == (1, 1)


def test_results_of_a_step_outlive_the_next(runner: ModelRunner) -> None:
    sequence = OneSequence(runner, [3, 5])
    first = sequence.step(PROMPT, num_logprobs=1)
    kept = [column.copy() for column in first]
    sequence.step([7], num_logprobs=1)
    for column, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(column, copy)


def test_an_arena_that_is_read_only_or_too_small_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="writable"):
        ArenaViews(bytes(ARENA_BYTES), LAYOUT)
    with pytest.raises(ValueError, match="ends at byte"):
        ArenaViews(bytearray(ARENA_BYTES - 200), LAYOUT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_gives_the_tokens_of_its_folder(tmp_path: Path, family: str) -> None:
    folder = make_tiny_model(tmp_path / "hf", family)
    prompts = [PROMPT, PROMPT[::-1]]
    expected = Generator(load_runner(folder)).generate(prompts)
    gguf = write_tiny_gguf(folder, tmp_path / "tiny.gguf")
    assert Generator(load_runner(gguf)).generate(prompts) == expected


def test_a_quantised_file_runs_in_bfloat16_unless_told_otherwise(tmp_path: Path) -> None:
    path = write_tiny_gguf(make_tiny_model(tmp_path / "hf"), tmp_path / "tiny.gguf", "Q8_0")
    assert load_runner(path).facts.dtype == "bfloat16"
    assert load_runner(path, dtype="float32").facts.dtype == "float32"


def test_dummy_weights_need_only_a_config_and_repeat_with_the_seed(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen3", hidden_size=96, num_hidden_layers=3)
    (folder / "model.safetensors").unlink()
    first, second, other = (load_runner(folder, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    values, same, different = (
        torch.cat([each.decoder.embedding.data, each.decoder.layers[2].mlp.down.weight.data])
        for each in (first, second, other)
    )
    assert torch.equal(values, same)
    assert not torch.equal(values, different)
    assert values.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(first.decoder.lm_head.norm, torch.ones(96))
    assert len(Generator(first).generate([PROMPT], max_tokens=5)[0]) == 5


def test_progress_is_reported_from_zero_to_one(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(model=str(make_tiny_model(tmp_path))))
    seen: list[tuple[str, float]] = []
    ModelRunner.load(config, resolve(config.model), lambda phase, share: seen.append((phase, share)))
    assert [phase for phase, _ in seen] == ["loading_weights"] * len(seen)
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    assert seen[-1][1] == 1.0


def test_the_plan_follows_the_configuration(tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(model=str(make_tiny_model(tmp_path)), max_model_len=100),
        cache=CacheConfig(num_gpu_blocks_override=7),
    )
    runner = ModelRunner.load(config, resolve(config.model), lambda phase, share: None)
    assert (runner.plan_memory().num_blocks, runner.plan_memory().max_model_len) == (7, 100)
    runner.allocate(7)
    assert runner.decoder.layers[1].attention.v_cache.shape == (7, 2, 16, 16)


def test_what_cannot_fit_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P3."""
    monkeypatch.setattr("hybrid_serve.runner.memory.free_bytes", lambda: 10**6)
    config = Config(model=ModelConfig(model=str(make_tiny_model(tmp_path)), max_model_len=512))
    seen: list[str] = []
    with pytest.raises(StartupError) as caught:
        ModelRunner.load(config, resolve(config.model), lambda phase, share: seen.append(phase))
    assert (caught.value.failure.code, caught.value.failure.exit_code, seen) == ("HS-E026", 12, [])


def test_what_was_fitted_to_the_memory_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P3, S50."""
    runner = load_runner(make_tiny_model(tmp_path))
    monkeypatch.setattr(runner.device, "free_bytes", lambda: 1_300_000)
    facts = InlineExecutor(runner.config, runner).allocate()
    assert facts.max_num_seqs < 256
    assert facts.max_model_len < 512
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"max_num_seqs {facts.max_num_seqs} instead of 256" in warning.message
    assert f"context limited to {facts.max_model_len} of 512" in warning.message


def test_a_device_that_is_not_there_is_a_startup_error(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(model=str(make_tiny_model(tmp_path))), engine=EngineConfig(device="cuda"))
    with pytest.raises(StartupError) as caught:
        ModelRunner.load(config, resolve(config.model), lambda phase, share: None)
    assert (caught.value.failure.code, caught.value.failure.exit_code) == ("HS-E025", 2)


def test_a_gpu_that_the_build_cannot_use_is_mentioned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hybrid_serve._kernels.has_cuda", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert open_device(Config()).describe().startswith("cpu")
    assert "built without CUDA kernels" in caplog.text


def test_weights_in_bfloat16_and_float16_are_kept_in_their_type(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "hf")
    for kind, name in (("BF16", "bfloat16"), ("F16", "float16")):
        runner = load_runner(write_tiny_gguf(folder, tmp_path / f"{kind}.gguf", kind))
        assert runner.facts.dtype == name
        assert runner.decoder.embedding.data.dtype == getattr(torch, name)
