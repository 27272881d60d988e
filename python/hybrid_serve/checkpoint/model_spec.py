"""ModelSpec: what a checkpoint's metadata says about the model, in one vocabulary for folders and GGUF files.

Knows numbers and names; not tensors, not torch, not how a model computes. Both the engine and the API server read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .failures import corrupt
from .tensors import FloatName

RopeKind = Literal["default", "linear", "llama3", "yarn", "factors"]
MAX_SIZE = 1 << 24  # larger than any hidden size, vocabulary or position count in use


@dataclass(frozen=True)
class RopeSpec:
    """How positions turn into angles. ``factors``: one divisor per frequency, as GGUF stores Llama 3's scaling."""

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: yarn's own rule
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """``dtype`` is the checkpoint's, bfloat16 for quantised files; ``sliding_window`` 0: attention sees everything."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position: int
    rope: RopeSpec
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int
    eos_token_ids: tuple[int, ...]
    dtype: FloatName


def checked(spec: ModelSpec, path: Path) -> ModelSpec:
    """``spec``, unless its numbers cannot work together: then StartupError (HS-E022) naming ``path``."""

    def check(condition: bool, why: str) -> None:
        if not condition:
            raise corrupt(path, why, "use the model's own, unchanged files")

    check(
        spec.num_heads % spec.num_kv_heads == 0,
        f"{spec.num_heads} heads do not share {spec.num_kv_heads} KV heads evenly",
    )
    check(
        spec.head_dim % 2 == 0 and spec.head_dim <= 512,
        f"the head size is {spec.head_dim}, expected even and up to 512",
    )
    check(spec.num_layers <= 1024, f"it claims {spec.num_layers} layers")
    check(spec.num_heads <= 4096, f"it claims {spec.num_heads} heads")
    check(0 < spec.rms_norm_eps < 1, f"the norms' epsilon is {spec.rms_norm_eps}")
    check(1 <= spec.rope.theta < 1e12, f"the rotary base is {spec.rope.theta}")
    check(0 < spec.rope.factor < 1e6, f"the rotary scaling factor is {spec.rope.factor}")
    check(
        0 <= spec.rope.original_max_position <= MAX_SIZE, f"the original context is {spec.rope.original_max_position}"
    )
    check(all(0 < each < 1e6 for each in spec.rope.factors), "a divisor of the rotary frequencies is not positive")
    check(0 <= spec.sliding_window <= MAX_SIZE, f"the sliding window is {spec.sliding_window}")
    for each in spec.eos_token_ids:
        check(0 <= each < spec.vocab_size, f"the end-of-text token {each} is not among {spec.vocab_size} tokens")
    return spec
