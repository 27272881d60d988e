"""How long a context may be, how many KV blocks there are, and what else takes memory: arithmetic over what was asked
for and what is free; nothing is tried out.

What the user set is kept or refused, never changed. What was left open is fitted to the machine, and the plan's
``notes`` say how.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.model_spec import ModelSpec
from ..config import CacheConfig
from ..errors import StartupError

MIB = 2**20
DEFAULT_CACHE_BYTES = 256 * MIB
DEFAULT_FULL_CONTEXTS = 4
SHARE_OF_FREE = 0.4  # the default cache takes no more of the free memory than this
# A step of this many tokens takes about 0.25 s on two cores with a model of 135M: that is how long a long prompt makes
# a running stream wait. More would lengthen the wait and, measured, not add throughput.
CPU_BATCHED_TOKENS = 512
SHORTEST_CONTEXT = 256  # a server with less than this is of no use; better to say so


@dataclass(frozen=True)
class MemoryPlan:
    """``rows``: what takes how many bytes, for people; ``notes``: what was fitted to the machine."""

    num_blocks: int
    max_model_len: int
    rows: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()


def activation_bytes(spec: ModelSpec, item_bytes: int, max_tokens: int, max_rows: int) -> int:
    """Intermediate results of the largest step: ``max_tokens`` through a layer, ``max_rows`` of them to logits."""
    heads, kv_heads, inner = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
    # Embedding, norm and both outputs; q, k and v; attention's result; gate, up and their product; the f32 residual.
    per_token = item_bytes * (4 * spec.hidden_size + 2 * heads + 2 * kv_heads + 3 * inner) + 4 * spec.hidden_size
    per_row = 4 * spec.vocab_size + (2 * item_bytes + 4) * spec.hidden_size
    return max_tokens * per_token + max_rows * per_row


def longest_context(spec: ModelSpec, requested: int) -> int:
    """Tokens of prompt and reply. Raises StartupError (HS-E024) if ``requested`` is more than the model can do."""
    limit, reason = spec.max_position, "its positions end there"
    if spec.rope.kind == "yarn":
        limit = max(limit, int(spec.rope.original_max_position * spec.rope.factor))
    if 0 < spec.sliding_window < limit:
        # Up to the window's length, windowed attention is full attention, which is the one implemented.
        limit, reason = spec.sliding_window, "its sliding window of attention is not implemented beyond that"
    if requested > limit:
        raise StartupError(
            "HS-E024",
            f"--max-model-len {requested} is more than the model can do",
            f"this model takes up to {limit} tokens: {reason}",
            f"--max-model-len {limit}, or leave it out",
        )
    return requested or limit


def plan_memory(
    cache: CacheConfig,
    *,
    weight_bytes: int,
    activation_bytes: int,
    block_bytes: int,
    max_model_len: int,
    is_length_fixed: bool,
    max_num_seqs: int,
    free_bytes: int,
    cache_budget: int | None = None,
) -> MemoryPlan:
    """``free_bytes``: after weights and activations. ``cache_budget``: bytes of a cache of which nothing is said; None:
    a few contexts, within a share of what is free. ``is_length_fixed``: the user set ``max_model_len``. Raises
    StartupError (HS-E026, exit code 12) with the numbers if the cache does not fit, or cannot hold one request of the
    length asked for."""
    blocks_a_context = -(-max_model_len // cache.block_size)
    notes: list[str] = []
    if cache.num_gpu_blocks_override > 0:
        num_blocks = cache.num_gpu_blocks_override
    elif cache.kv_cache_memory_bytes > 0:
        num_blocks = cache.kv_cache_memory_bytes // block_bytes
    elif cache_budget is not None:
        num_blocks = cache_budget // block_bytes
    else:
        wanted = max(DEFAULT_FULL_CONTEXTS * blocks_a_context, DEFAULT_CACHE_BYTES // block_bytes)
        affordable = int(free_bytes * SHARE_OF_FREE) // block_bytes
        num_blocks = min(wanted, affordable, max_num_seqs * blocks_a_context)
        if affordable < wanted:
            notes.append(
                f"KV cache limited to {_mib(num_blocks * block_bytes)}, {SHARE_OF_FREE:.0%} of the free memory"
            )
    if num_blocks * block_bytes > free_bytes:
        raise _does_not_fit(
            f"a KV cache of {_mib(num_blocks * block_bytes)} does not fit",
            f"{num_blocks} blocks of {block_bytes} bytes; {_mib(free_bytes)} are free after the weights",
            f"--kv-cache-memory-bytes {max(free_bytes // 2 // MIB, 1)}MiB, or a smaller --max-model-len",
        )
    rows = (
        ("weights", weight_bytes),
        ("activations", activation_bytes),
        (f"KV cache, {num_blocks} blocks of {cache.block_size} tokens", num_blocks * block_bytes),
        ("left free", free_bytes - num_blocks * block_bytes),
    )
    if num_blocks >= blocks_a_context:
        return MemoryPlan(num_blocks, max_model_len, rows, tuple(notes))
    fitting = num_blocks * cache.block_size
    if is_length_fixed or fitting < min(SHORTEST_CONTEXT, max_model_len):
        raise _does_not_fit(
            f"the KV cache is too small for a context of {max_model_len} tokens",
            f"that takes {_mib(blocks_a_context * block_bytes)}, the cache has {_mib(num_blocks * block_bytes)}",
            f"--kv-cache-memory-bytes {-(-blocks_a_context * block_bytes // MIB)}MiB, or --max-model-len {fitting}",
        )
    notes.append(f"context limited to {fitting} of {max_model_len} tokens, as many as the KV cache holds")
    return MemoryPlan(num_blocks, fitting, rows, tuple(notes))


def check_weights_fit(weight_bytes: int, free_bytes: int) -> None:
    """Raises StartupError (HS-E026, exit code 12) before anything is loaded."""
    if weight_bytes > free_bytes:
        raise _does_not_fit(
            "the model does not fit in memory",
            f"its weights take {_mib(weight_bytes)}, {_mib(free_bytes)} are free",
            "--dtype bfloat16 if another one is set, a smaller model, or a machine with more memory",
        )


def _does_not_fit(what: str, why: str, fix: str) -> StartupError:
    return StartupError("HS-E026", what, why, fix)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.0f} MiB"
