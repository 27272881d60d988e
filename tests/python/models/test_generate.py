"""Greedy tokens of scheduler + runner equal those of transformers, whatever else happens in the batch (S49, F-21).

float32, tiny random models of every family. The reference is one forward pass over prompt + reply: the reply is greedy
exactly if every token of it is the most likely one after those before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_serve.runner.model_runner import ModelRunner
from in_process import Generator, load_runner
from ragged import Ragged
from tiny_models import FAMILIES, make_tiny_model

LENGTHS = [3, 40, 17, 1, 64, 33, 16, 25, 5, 48, 90, 2, 31, 32, 70, 12]
NUM_TOKENS = 20


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [[(19 * index + 7 * at + at * at) % 509 + 3 for at in range(length)] for index, length in enumerate(lengths)]


PROMPTS = prompts_of(LENGTHS)


class Reference:
    """A tiny model of each family, with its replies to PROMPTS when each runs alone, checked against transformers."""

    def __init__(self, folder: Path) -> None:
        self.runner = load_runner(folder)
        self.replies = [Generator(self.runner).generate([prompt], max_tokens=NUM_TOKENS)[0] for prompt in PROMPTS]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.most_likely = []
        for prompt, reply in zip(PROMPTS, self.replies, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + reply])).logits[0]
            self.most_likely.append(logits[len(prompt) - 1 : -1].argmax(-1).tolist())


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    root = tmp_path_factory.mktemp("models")
    return {family: Reference(make_tiny_model(root / family, family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def reference(references: dict[str, Reference], request: pytest.FixtureRequest) -> Reference:
    return references[request.param]


def test_replies_alone_are_those_of_transformers(reference: Reference) -> None:
    assert reference.replies == reference.most_likely
    assert all(len(reply) == NUM_TOKENS for reply in reference.replies)
    assert len({tuple(reply) for reply in reference.replies}) > 12  # the models do not just repeat one token


def test_a_batch_of_16_with_chunked_prefill_gives_the_same(reference: Reference) -> None:
    generator = Generator(reference.runner, max_num_seqs=16, max_num_batched_tokens=24)
    assert generator.generate(PROMPTS, max_tokens=NUM_TOKENS) == reference.replies
    assert generator.scheduler.stats().steps > NUM_TOKENS + sum(LENGTHS) // 24 - 1


def test_preemption_gives_the_same(reference: Reference) -> None:
    generator = Generator(reference.runner, num_blocks=14, max_num_batched_tokens=64, enable_prefix_caching=False)
    assert generator.generate(PROMPTS, max_tokens=NUM_TOKENS) == reference.replies
    assert generator.scheduler.stats().num_preemptions > 0


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_swapped_blocks_give_the_same(reference: Reference, enable_prefix_caching: bool) -> None:  # F-19, S47
    options: dict[str, Any] = {"num_blocks": 8, "enable_prefix_caching": enable_prefix_caching}
    fitting = [(prompt, reply) for prompt, reply in zip(PROMPTS, reference.replies, strict=True) if len(prompt) < 70]
    prompts, replies = [prompt for prompt, _ in fitting], [reply for _, reply in fitting]
    generator = Generator(reference.runner, num_host_blocks=100, **options)
    assert generator.generate(prompts, max_tokens=NUM_TOKENS) == replies
    stats = generator.scheduler.stats()
    assert stats.blocks_swapped_out >= stats.blocks_swapped_in > 0
    assert (stats.host_blocks_used, stats.host_blocks_total, stats.num_swapped) == (0, 100, 0)
    sampled: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": NUM_TOKENS}
    alone = Generator(reference.runner)
    expected = [reply for prompt in prompts for reply in alone.generate([prompt], **sampled)]
    again = Generator(reference.runner, num_host_blocks=100, **options)  # the runner serves the last one made
    assert again.generate(prompts, **sampled) == expected
    assert again.scheduler.stats().blocks_swapped_in > 0


def test_prefix_hits_give_the_same(reference: Reference) -> None:
    generator = Generator(reference.runner)
    assert generator.generate(PROMPTS, max_tokens=NUM_TOKENS) == reference.replies
    before = generator.scheduler.stats().prefix_hits
    assert generator.generate(PROMPTS, max_tokens=NUM_TOKENS) == reference.replies
    assert generator.scheduler.stats().prefix_hits - before >= sum(length // 16 * 16 for length in LENGTHS) // 2


def test_forks_of_one_prompt_give_the_same(reference: Reference) -> None:
    found = Generator(reference.runner, max_num_batched_tokens=40).generate(PROMPTS, n=2, max_tokens=NUM_TOKENS)
    assert found == [reply for reply in reference.replies for _ in range(2)]


def test_sampled_tokens_depend_on_the_seed_alone(references: dict[str, Reference]) -> None:
    runner = references["llama"].runner
    drawn = [
        Generator(runner).generate([prompt], max_tokens=12, temperature=1.0, top_p=0.95, seed=7)[0]
        for prompt in PROMPTS[:6]
    ]
    together = Generator(runner, num_blocks=8, max_num_seqs=6, max_num_batched_tokens=16)
    assert together.generate(PROMPTS[:6], max_tokens=12, temperature=1.0, top_p=0.95, seed=7) == drawn
    other = Generator(runner).generate(PROMPTS[:6], max_tokens=12, temperature=1.0, top_p=0.95, seed=8)
    assert other != drawn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_in_a_batch_are_bit_equal_to_logits_alone(tmp_path: Path, dtype: str) -> None:
    """Batch-invariant: chunks, neighbours and their number change no bit of a row."""
    runner = load_runner(make_tiny_model(tmp_path, "qwen3"), dtype=dtype)
    alone = [rows_of(runner, [prompt], len(prompt))[0] for prompt in PROMPTS[:8]]
    together = rows_of(runner, PROMPTS[:8], 1000)
    chunked = rows_of(runner, PROMPTS[:8], 7)
    for one, batched, in_chunks in zip(alone, together, chunked, strict=True):
        assert torch.equal(one, batched)
        assert torch.equal(one, in_chunks)


def rows_of(runner: ModelRunner, prompts: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """Logits of every row of each prompt, at most ``chunk`` tokens of each prompt in a batch."""
    ragged = Ragged(runner)
    sequences = [ragged.open(prompt) for prompt in prompts]
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(each.num_computed < len(each.tokens) for each in sequences):
        work = [
            (index, min(chunk, len(each.tokens) - each.num_computed))
            for index, each in enumerate(sequences)
            if each.num_computed < len(each.tokens)
        ]
        for (index, _), logits in zip(work, ragged.logits([(sequences[i], n) for i, n in work]), strict=True):
            found[index].append(logits)
    return [torch.cat(rows) for rows in found]
