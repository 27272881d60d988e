"""How long a context may be and how many KV blocks there are: arithmetic over what was asked for and what is free.

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
SHORTEST_CONTEXT = 256  # a server with less than this is of no use; better to say so


@dataclass(frozen=True)
class CachePlan:
    num_blocks: int
    max_model_len: int
    notes: tuple[str, ...] = ()


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


def plan_cache(
    cache: CacheConfig,
    *,
    block_bytes: int,
    max_model_len: int,
    is_length_fixed: bool,
    max_num_seqs: int,
    free_bytes: int,
) -> CachePlan:
    """``is_length_fixed``: the user set ``max_model_len``. Raises StartupError (HS-E026, exit code 12) with the numbers
    if the cache does not fit, or cannot hold one request of the length asked for."""
    blocks_a_context = -(-max_model_len // cache.block_size)
    notes: list[str] = []
    if cache.num_gpu_blocks_override > 0:
        num_blocks = cache.num_gpu_blocks_override
    elif cache.kv_cache_memory_bytes > 0:
        num_blocks = cache.kv_cache_memory_bytes // block_bytes
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
    if num_blocks >= blocks_a_context:
        return CachePlan(num_blocks, max_model_len, tuple(notes))
    fitting = num_blocks * cache.block_size
    if is_length_fixed or fitting < min(SHORTEST_CONTEXT, max_model_len):
        raise _does_not_fit(
            f"the KV cache is too small for a context of {max_model_len} tokens",
            f"that takes {_mib(blocks_a_context * block_bytes)}, the cache has {_mib(num_blocks * block_bytes)}",
            f"--kv-cache-memory-bytes {-(-blocks_a_context * block_bytes // MIB)}MiB, or --max-model-len {fitting}",
        )
    notes.append(f"context limited to {fitting} of {max_model_len} tokens, as many as the KV cache holds")
    return CachePlan(num_blocks, fitting, tuple(notes))


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
