"""SmolLM2-135M-Instruct (GGUF Q4_1) against transformers with the same dequantised weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo_model import demo_file
from hybrid_serve.checkpoint.checkpoint import open_checkpoint
from hybrid_serve.checkpoint.gguf import GgufFile
from hybrid_serve.checkpoint.hub import resolve
from hybrid_serve.config import ModelConfig
from hybrid_serve.models import family_of
from hybrid_serve.models.names import expected_tensors
from hybrid_serve.runner.model_runner import ModelRunner
from in_process import Generator, load_runner
from ragged import Ragged

NUM_TOKENS = 64
MEAN_TOLERANCE = 0.3  # of bfloat16 logits, which spread over some 30; single logits stray further


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_file().parent


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    """20 prompts of 8 to 46 tokens: stretches of the model's own chat template, spelled with its vocabulary."""
    tokens = GgufFile(resolve(ModelConfig(model=str(folder))).path).array("tokenizer.ggml.tokens")
    assert tokens is not None
    ids = {token: index for index, token in enumerate(tokens.strings())}
    words = (
        "The capital of France is a city in Europe and it has many museums . A small cat sat on the mat while the dog "
        "looked at the moon , because the night was cold and the people of the town were sleeping in their houses ."
    )
    spelled = [ids.get("Ġ" + word, ids.get(word, 0)) for word in words.split()]
    start, end, line = ids["<|im_start|>"], ids["<|im_end|>"], ids["Ċ"]
    return [
        [
            start,
            ids["user"],
            line,
            *spelled[index : index + 2 + 2 * index],
            end,
            line,
            start,
            ids["ass"],
            ids["istant"],
            line,
        ]
        for index in range(20)
    ]


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    """transformers' Llama in float32 with the weights that our reader dequantises."""
    checkpoint = open_checkpoint(resolve(ModelConfig(model=str(folder))))
    spec, source = checkpoint.spec, checkpoint.source
    assert source is not None
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_theta": spec.rope.theta, "rope_type": "default"},
        max_position_embeddings=spec.max_position,
        tie_word_embeddings=spec.tie_embeddings,
    )
    model = LlamaForCausalLM(config)
    weights = {
        name: torch.from_numpy(source.read(name, "float32").copy())
        for name, _ in expected_tensors(spec, family_of(spec))
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


def logits_of(runner: ModelRunner, prompt: list[int]) -> torch.Tensor:
    ragged = Ragged(runner)
    return ragged.logits([(ragged.open(prompt), len(prompt))])[0]


def test_greedy_tokens_in_float32_equal_those_of_transformers(
    folder: Path, prompts: list[list[int]], reference: LlamaForCausalLM
) -> None:
    """20 prompts x 64 tokens in one batch. One pass of the reference over prompt + reply checks all 64 at once."""
    generator = Generator(load_runner(folder, dtype="float32"), max_num_batched_tokens=256)
    replies = generator.generate(prompts, max_tokens=NUM_TOKENS)
    for prompt, reply in zip(prompts, replies, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        assert len(reply) == NUM_TOKENS
        assert reply == logits.argmax(-1).tolist()


def test_logits_in_float32_equal_those_of_transformers(
    folder: Path, prompts: list[list[int]], reference: LlamaForCausalLM
) -> None:
    runner = load_runner(folder, dtype="float32")
    for prompt in prompts[::9]:
        with torch.no_grad():
            expected = reference(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits_of(runner, prompt), expected, rtol=0, atol=2e-3)


def test_logits_in_bfloat16_are_as_close_to_float32_as_those_of_transformers(
    folder: Path, prompts: list[list[int]], reference: LlamaForCausalLM
) -> None:
    runner = load_runner(folder)
    assert runner.facts.dtype == "bfloat16"
    rival = copy.deepcopy(reference).bfloat16()
    ours, theirs, agreed = [], [], []
    for prompt in prompts[::9]:
        found = logits_of(runner, prompt)
        with torch.no_grad():
            expected = reference(torch.tensor([prompt])).logits[0]
            theirs.append((rival(torch.tensor([prompt])).logits[0].float() - expected).abs().mean(-1))
        ours.append((found - expected).abs().mean(-1))
        agreed.append(found.argmax(-1) == expected.argmax(-1))
    assert torch.cat(ours).mean() < MEAN_TOLERANCE
    assert torch.cat(ours).mean() < 1.1 * torch.cat(theirs).mean()
    assert torch.cat(agreed).float().mean() > 0.9
