"""A KV cache in fp8 (S54): what it costs in exactness, and that it changes nothing else."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from demo_model import demo_file
from hybrid_serve.errors import StartupError
from hybrid_serve.runner.model_runner import ModelRunner
from in_process import Generator, load_runner
from ragged import Ragged
from references import VARIANTS, prompts_of, reference
from tiny_models import make_tiny_model

LENGTHS = [1, 5, 33, 70, 16]
SCALES = {"k": 0.02, "v": 0.015}  # a tiny model's keys and values are below 448 times these


def logits_of(runner: ModelRunner, prompts: list[list[int]]) -> list[Tensor]:
    """Of chunks of different sizes side by side: whole prompts, parts, single rows after a prefix."""
    ragged = Ragged(runner)
    sequences = [ragged.open(prompt) for prompt in prompts]
    found: list[list[Tensor]] = [[] for _ in prompts]
    for counts in ([1, 4, 20, 1, 16], [0, 1, 13, 64, 0], [0, 0, 0, 5, 0]):
        work = [index for index, count in enumerate(counts) if count]
        for index, logits in zip(work, ragged.logits([(sequences[i], counts[i]) for i in work]), strict=True):
            found[index].append(logits)
    return [torch.cat(parts) for parts in found]


class RoundedCache(DynamicCache):
    """transformers' cache, whose keys and values are rounded as ours are."""

    def __init__(self, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
        super().__init__()
        self._scales = k_scale, v_scale

    def update(self, key_states: Tensor, value_states: Tensor, *where: Any, **options: Any) -> tuple[Tensor, Tensor]:
        k, v = (
            (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            for states, scale in zip((key_states, value_states), self._scales, strict=True)
        )
        kept: tuple[Tensor, Tensor] = super().update(k, v, *where, **options)
        return kept


def rounded_reference(folder: Path, prompts: list[list[int]], **scales: float) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    argument = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # its older name
    with torch.no_grad():
        return [
            model(torch.tensor([prompt]), use_cache=True, **{argument: RoundedCache(**scales)}).logits[0]
            for prompt in prompts
        ]


def add_scales(folder: Path, names: str, **scales: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for layer in range(2):
        for kind, scale in scales.items():
            tensors[f"model.layers.{layer}.self_attn.{names.format(kind)}"] = torch.tensor([scale])
    save_file(tensors, path, metadata={"format": "pt"})


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    return float((torch.cat(found) - torch.cat(wanted)).abs().mean())


@pytest.mark.parametrize("variant", ["llama", "qwen3", "odd sizes"])
def test_logits_are_those_of_transformers_with_a_cache_that_rounds(tmp_path: Path, variant: str) -> None:
    family, overrides = VARIANTS[variant]
    folder, prompts = make_tiny_model(tmp_path, family, **overrides), prompts_of(LENGTHS)
    found = logits_of(load_runner(folder, kv_cache_dtype="fp8"), prompts)
    # Now and then an element that lies between two of fp8 goes the other way: hence the mean. Unrounded, all stray.
    assert distance(found, rounded_reference(folder, prompts)) < 0.1 * distance(found, reference(folder, prompts))
    # Of logits that spread over some 6.
    assert 0 < distance(found, reference(folder, prompts)) < 0.2


@pytest.mark.parametrize("names", ["{}_scale", "{0}_proj.{0}_scale"])
def test_scales_of_the_checkpoint_are_used_by_an_fp8_cache_alone(tmp_path: Path, names: str) -> None:
    folder, prompts = make_tiny_model(tmp_path, "qwen3"), prompts_of(LENGTHS)
    plain = logits_of(load_runner(folder), prompts)
    add_scales(folder, names, **SCALES)
    found = logits_of(load_runner(folder, kv_cache_dtype="fp8_e4m3"), prompts)
    scaled = rounded_reference(folder, prompts, k_scale=SCALES["k"], v_scale=SCALES["v"])
    assert distance(found, scaled) < 0.1 * distance(found, plain)
    assert distance(found, scaled) < 0.1 * distance(found, rounded_reference(folder, prompts))
    assert all(torch.equal(a, b) for a, b in zip(plain, logits_of(load_runner(folder), prompts), strict=True))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_scale_is_a_corrupt_checkpoint(tmp_path: Path, scale: float) -> None:
    add_scales(make_tiny_model(tmp_path), "{}_scale", v=scale)
    with pytest.raises(StartupError) as caught:
        load_runner(tmp_path, kv_cache_dtype="fp8")
    assert caught.value.failure.code == "HS-E022"
    assert "self_attn.v_scale" in caught.value.failure.why


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_preemption_prefixes_and_swaps_change_no_token(tmp_path: Path, dtype: str) -> None:  # S49, S51
    runner = load_runner(make_tiny_model(tmp_path, "qwen2"), dtype=dtype, kv_cache_dtype="fp8")
    prompts = prompts_of([3, 12, 14, 1, 40, 13, 15, 11])
    prompts += [[*prompts[4][:32], 7], [*prompts[4][:32], 9, 9]]
    alone = [Generator(runner).generate([prompt], max_tokens=20)[0] for prompt in prompts]
    together = Generator(runner, max_num_seqs=16, max_num_batched_tokens=24)
    assert together.generate(prompts, max_tokens=20) == alone
    for host_blocks in (0, 50):
        tight = Generator(runner, num_blocks=5, num_host_blocks=host_blocks, max_num_batched_tokens=64)
        assert tight.generate(prompts, max_tokens=20) == alone
        assert tight.scheduler.stats().num_preemptions > 0
    forked = Generator(runner).generate([prompts[1]], n=3, max_tokens=20)
    assert forked == [alone[1]] * 3


def test_a_block_takes_half_the_bytes_of_16_bits(tmp_path: Path) -> None:  # P3
    folder = make_tiny_model(tmp_path)
    kinds = ("auto", "fp8", "fp8_e4m3")
    sizes = [load_runner(folder, dtype="bfloat16", kv_cache_dtype=kind).facts.block_bytes for kind in kinds]
    assert sizes == [sizes[0], sizes[0] // 2, sizes[0] // 2]


def test_the_demo_model_says_the_same_for_most_of_its_greedy_tokens() -> None:
    """SmolLM2-135M: each prompt's tokens until the first that differs, and what follows the same context."""
    folder = demo_file().parent
    exact = load_runner(folder)
    rounded = load_runner(folder, kv_cache_dtype="fp8")
    prompts = [[1, 9690, 198, 2683 + 37 * index, 253, 5356, 282 + index, 30, 2] for index in range(8)]
    replies = Generator(exact).generate(prompts, max_tokens=32)
    agreed = []
    for prompt, reply in zip(prompts, replies, strict=True):
        ragged = Ragged(rounded)
        logits = ragged.logits([(ragged.open(prompt + reply), len(prompt + reply))])[0]
        agreed.append(logits[len(prompt) - 1 : -1].argmax(-1) == torch.tensor(reply))
    assert torch.cat(agreed).float().mean() > 0.8
