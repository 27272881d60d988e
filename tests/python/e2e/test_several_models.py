"""Three real models behind one address with a budget for two (P9)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from hybrid_serve import LLM, SamplingParams
from tiny_models import make_tiny_model

from .server import serving

FAMILIES = {"first": "llama", "second": "qwen3", "third": "mistral"}
PROMPTS = ["Once upon a time", "The capital of"]
NUM_TOKENS = 12
PATIENCE = 120.0


def test_three_models_with_a_budget_for_two_answer_as_each_does_alone(tmp_path: Path) -> None:
    """P9: all answer, the one unused for longest goes, nothing is a 5xx; one after the other, then all at once."""
    lines, alone = [], dict[tuple[str, str], list[int]]()
    for seed, (name, family) in enumerate(FAMILIES.items()):
        folder = make_tiny_model(tmp_path / name, family, seed=seed)
        lines.append(f"{name}: {{model: {folder}, kv_cache_memory_bytes: 4MiB, cpu_threads: 1}}\n")
        llm = LLM(str(folder), kv_cache_memory_bytes=4 * 2**20, cpu_threads=1)
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            alone[name, prompt] = list(output.outputs[0].token_ids)
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone), "models that answer alike prove nothing"
    file = tmp_path / "models.yaml"
    file.write_text("".join(lines))
    with serving("--models", str(file), "--max-loaded-models", "2") as server:

        def check(name: str, prompt: str) -> None:
            body: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            response = httpx.post(server.url + "/v1/completions", json=body, timeout=PATIENCE)
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["token_ids"] == alone[name, prompt]

        def states() -> list[str]:
            return [card["state"] for card in httpx.get(server.url + "/v1/models").json()["data"]]

        assert states() == ["unloaded"] * 3
        for name in FAMILIES:
            check(name, PROMPTS[0])
        assert states() == ["unloaded", "ready", "ready"]
        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(check, name, prompt) for prompt in PROMPTS for name in FAMILIES]:
                done.result()
        assert sorted(states()) == ["ready", "ready", "unloaded"]
        metrics = httpx.get(server.url + "/metrics").text
        assert 'status="5xx"' not in metrics
        counts = [f'vllm:generation_tokens_total{{engine="{i}",model_name="{n}"}} 36.0' for i, n in enumerate(FAMILIES)]
        assert [line for line in metrics.splitlines() if line in counts] == counts
