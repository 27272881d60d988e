"""Seeded request sets for whole-engine benchmarks: token ids in, greedy or sampled, end-of-sequence ignored."""

from __future__ import annotations

import numpy as np

NAMES = ("single", "batch32", "batch256", "chat", "chat_sampled", "long", "prefix", "prefill")
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 1}


def make(name: str, vocab_size: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """(prompt token ids, number of output tokens) of every request; all arrive at once. Raises KeyError."""
    random = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(token) for token in random.integers(10, min(vocab_size, 32000), count)]

    if name in ("chat", "chat_sampled"):  # lengths like those of ShareGPT
        prompts = np.clip(random.lognormal(4.9, 1.0, 768), 4, 1024).astype(int)
        outputs = np.clip(random.lognormal(5.0, 0.8, 768), 4, 1024).astype(int)
        return [(ids(int(a)), int(b)) for a, b in zip(prompts, outputs, strict=True)]
    if name == "prefix":
        shared = ids(2048)
        return [(shared + ids(64), 64) for _ in range(512)]
    count, prompt, output = {"single": (1, 128, 256), "batch32": (32, 128, 256), "batch256": (256, 128, 256),
                             "long": (48, 6000, 256), "prefill": (64, 4096, 1)}[name]  # fmt: skip
    return [(ids(prompt), output) for _ in range(count)]
