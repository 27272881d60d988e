"""The runner on a GPU: the same tokens as transformers, whatever is captured, overlapped, or cut into pieces (B3, P14).

Runs where there is a GPU and the CUDA kernels were compiled; elsewhere it is skipped.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_serve import _kernels
from hybrid_serve.errors import StartupError
from hybrid_serve.runner.pad_sizes import PadSizes, pad_sizes
from in_process import Generator, load_runner
from ragged import Ragged
from references import VARIANTS, prompts_of, reference
from tiny_models import FAMILIES, make_tiny_model

pytestmark = pytest.mark.skipif(not (_kernels.has_cuda() and torch.cuda.is_available()), reason="no GPU")

WIDE: dict[str, Any] = {"head_dim": 64}  # the 16-bit attention kernels have no head size below 64


def generator(folder: Path, dtype: str, **options: Any) -> Generator:
    padded = options.pop("padded", True)
    eager, kv_cache_dtype = options.pop("enforce_eager", False), options.pop("kv_cache_dtype", "auto")
    # Comparing bits needs kernels whose sums do not depend on how many rows a step has.
    settings: dict[str, Any] = {"enforce_eager": eager, "batch_invariant": True, "kv_cache_dtype": kv_cache_dtype}
    runner = load_runner(folder, dtype=dtype, device="cuda", **settings)
    # 64: some steps are padded to more sequences than tokens.
    return Generator(runner, pad_sizes=pad_sizes(64, 2048) if padded else PadSizes(), max_num_seqs=64, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_equal_those_of_transformers(tmp_path: Path, variant: str) -> None:
    family, overrides = VARIANTS[variant]
    folder = make_tiny_model(tmp_path, family, **overrides)
    prompts = prompts_of([1, 5, 33, 70, 16])
    expected = reference(folder, prompts)
    ragged = Ragged(load_runner(folder, dtype="float32", device="cuda"))
    sequences = [ragged.open(prompt) for prompt in prompts]
    for logits, wanted in zip(ragged.logits([(s, len(s.tokens)) for s in sequences]), expected, strict=True):
        torch.testing.assert_close(logits.cpu(), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path, family, **WIDE)
    prompts = prompts_of([1, 7, 130, 300])
    expected = reference(folder, prompts)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.cuda()
    ragged = Ragged(load_runner(folder, dtype="bfloat16", device="cuda"))
    found = ragged.logits([(s, len(s.tokens)) for s in [ragged.open(prompt) for prompt in prompts]])
    with torch.no_grad():
        theirs = [model(torch.tensor([prompt]).cuda()).logits[0].float().cpu() for prompt in prompts]
    for ours, other, exact in zip(found, theirs, expected, strict=True):
        assert (ours.cpu() - exact).norm() <= 1.2 * (other - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_fp8_cache_gives_the_logits_that_it_gives_on_the_cpu(tmp_path: Path, dtype: str) -> None:  # S54
    folder = make_tiny_model(tmp_path, "qwen3", **WIDE)
    prompts = prompts_of([1, 7, 130, 300])
    found = []
    for device, kv_cache_dtype in (("cpu", "fp8"), ("cuda", "fp8"), ("cpu", "auto")):
        ragged = Ragged(load_runner(folder, dtype=dtype, device=device, kv_cache_dtype=kv_cache_dtype))
        sequences = [ragged.open(prompt) for prompt in prompts]
        parts = [
            ragged.logits([(s, count(len(s.tokens))) for s in sequences if count(len(s.tokens))])
            for count in (lambda n: n // 2, lambda n: n - n // 2 - 1, lambda n: 1)
        ]  # a decode at the end
        found.append(torch.cat([logits.cpu() for part in parts for logits in part]))
    on_cpu, on_gpu, unrounded = found
    assert (on_gpu - on_cpu).norm() < 0.5 * (on_gpu - unrounded).norm()


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"),
    [("float32", "auto"), ("bfloat16", "auto"), ("float16", "auto"), ("float32", "fp8"), ("bfloat16", "fp8")],
)
def test_captured_overlapped_and_padded_steps_give_the_tokens_of_plain_ones(
    tmp_path: Path, dtype: str, kv_cache_dtype: str
) -> None:
    folder = make_tiny_model(tmp_path, "qwen3", **WIDE)
    prompts = prompts_of([3, 40, 7, 90, 12, 200, 5])
    sampled: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 7, "max_tokens": 40}
    for params in ({"max_tokens": 40}, sampled, {**sampled, "num_logprobs": 3}):
        plain = generator(folder, dtype, padded=False, enforce_eager=True, kv_cache_dtype=kv_cache_dtype)
        expected = plain.generate(prompts, **params)
        captured = generator(folder, dtype, kv_cache_dtype=kv_cache_dtype)
        assert captured.generate(prompts, **params) == expected
        assert captured.generate(prompts, **params) == expected  # by now most steps are replayed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_that_were_captured_while_idle_give_the_tokens_of_plain_ones(tmp_path: Path, dtype: str) -> None:
    """P5: all of them before the first request, and again those of new shapes between two calls."""
    folder = make_tiny_model(tmp_path, "qwen3", **WIDE)
    prompts = prompts_of([3, 40, 7, 90, 12, 200, 5])
    captured, plain = generator(folder, dtype), generator(folder, dtype, padded=False, enforce_eager=True)
    before = prepare(captured)
    assert before > 30
    sampled: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 7, "max_tokens": 40}
    for params in ({"max_tokens": 40}, sampled, {**sampled, "num_logprobs": 3}, {**sampled, "n": 3}):
        expected = plain.generate(prompts, **params)
        assert captured.generate(prompts, **params) == expected
        assert (prepare(captured) > 0) == ("num_logprobs" in params)  # nothing else is of a shape that was not likely
        assert captured.generate(prompts, **params) == expected


def prepare(generator: Generator) -> int:
    """Everything that an idle engine would; how many pieces it was."""
    count = 0
    while (work := generator.runner.preparation()) is not None:
        work()
        count += 1
    return count


def test_tokens_equal_those_of_the_cpu_in_float32(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama")
    prompts = prompts_of([3, 40, 7, 90])
    on_cpu = Generator(load_runner(folder, dtype="float32", device="cpu"))
    for params in ({}, {"temperature": 0.8, "seed": 3}, {"frequency_penalty": 0.5, "logit_bias": [(5, 3.0)]}):
        assert generator(folder, "float32").generate(prompts, max_tokens=30, **params) == on_cpu.generate(
            prompts, max_tokens=30, **params
        )


def test_log_probabilities_come_back_for_the_rows_that_asked(tmp_path: Path) -> None:
    run = generator(make_tiny_model(tmp_path, "llama", **WIDE), "bfloat16")
    run.generate(prompts_of([5, 9]), max_tokens=6, num_logprobs=2)
    for result in run.results:
        assert result.logprobs is not None
        assert result.logprobs.shape == (len(result.tokens), 3)
        assert (result.logprobs <= 0).all()


def test_heads_without_a_kernel_are_a_startup_error(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="heads of size 16"):
        load_runner(make_tiny_model(tmp_path, "llama"), dtype="bfloat16", device="cuda")
    family, sizes = VARIANTS["odd sizes"]
    odd = make_tiny_model(tmp_path / "odd", family, **sizes)
    with pytest.raises(StartupError, match="heads of size 24 cannot have an fp8 cache"):
        load_runner(odd, dtype="float32", device="cuda", kv_cache_dtype="fp8")


def test_forked_choices_share_a_prompt_and_copy_its_last_block(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", **WIDE)
    params: dict[str, Any] = {"n": 4, "temperature": 1.0, "seed": 11, "max_tokens": 24}
    plain = generator(folder, "bfloat16", padded=False, enforce_eager=True)
    assert generator(folder, "bfloat16").generate(prompts_of([21]), **params) == plain.generate(
        prompts_of([21]), **params
    )


def test_decodes_that_begin_alike_give_what_each_gives_for_itself(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen3", **WIDE)
    beginning, *ends = prompts_of([300, 3, 20, 5, 9, 33, 1, 17, 2])
    prompts = [beginning + end for end in ends]
    found = {}
    for min_shared_tokens in (0, 256):
        run = generator(folder, "float16", min_shared_tokens=min_shared_tokens)
        for _ in range(3):  # the last one is replayed
            run.generate(prompts, max_tokens=4, num_logprobs=3)
        assert (run.num_prefixes > 0) == (min_shared_tokens > 0)
        logprobs = [result.logprobs for result in run.results if result.logprobs is not None]
        # Rows of a step are in no order.
        found[min_shared_tokens] = np.concatenate([np.sort(step, axis=0) for step in logprobs[:2]])
    np.testing.assert_allclose(found[256], found[0], rtol=0, atol=0.02)


def test_a_request_gets_the_same_logits_alone_and_in_200_mixes(tmp_path: Path) -> None:
    """Bit for bit, with its prompt cut anywhere: own kernels only (P14)."""
    folder = make_tiny_model(tmp_path, "qwen3", **WIDE)
    runner = load_runner(folder, dtype="bfloat16", device="cuda", batch_invariant=True)
    dice = random.Random(5)
    prompts = prompts_of([dice.randint(1, 150) for _ in range(9)])

    def alone(prompt: list[int]) -> torch.Tensor:
        ragged = Ragged(runner, has_decodes=False)
        return ragged.logits([(ragged.open(prompt), len(prompt))])[0][-1]

    expected = [alone(prompt) for prompt in prompts]
    for _ in range(200):
        ragged = Ragged(runner, has_decodes=False)
        chosen = dice.sample(range(len(prompts)), dice.randint(2, 6))
        sequences = {index: ragged.open(prompts[index]) for index in chosen}
        last: dict[int, torch.Tensor] = {}
        while left := [i for i in chosen if sequences[i].num_computed < len(prompts[i])]:
            counts = [dice.randint(1, len(prompts[i]) - sequences[i].num_computed) for i in left]
            logits = ragged.logits([(sequences[i], count) for i, count in zip(left, counts, strict=True)])
            last |= {index: rows[-1] for index, rows in zip(left, logits, strict=True)}
        for index in chosen:
            assert torch.equal(last[index], expected[index])
