"""What an engine may use of the memory there is: how long a context, how many requests at once, how large a step, how
many KV blocks. Arithmetic over what was asked for and what is free; nothing is tried out, and no torch is needed.

What the user set is kept or refused, never changed. What was left open is fitted to the machine, and the plan's
``notes`` say how.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config import MAX_NUM_SEQS, Config
from ..errors import StartupError
from .fixes import SHORTEST_CONTEXT, Case, fixes
from .pad_sizes import PadSizes
from .sizes import Machine, ModelSizes, StepLimits

MIB = 2**20
DEFAULT_CACHE_BYTES = 256 * MIB
DEFAULT_FULL_CONTEXTS = 4
SHARE_OF_FREE = 0.4  # a default cache that does not take all takes no more of the free memory than this
SHARE_OF_STEPS = 0.25  # nor do steps of which nothing is said, of what the weights leave
FEWEST_SEQS, FEWEST_TOKENS, FEWEST_CAPTURED = 8, 256, 64  # what is left open is not fitted below


@dataclass(frozen=True)
class MemoryPlan:
    """``rows``: what takes how many bytes, for people; ``notes``: what was fitted to the machine."""

    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    pad_sizes: PadSizes
    rows: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()
    num_host_blocks: int = 0
    swap_cost: int = 0  # see core/config.h


class _DoesNotFit(Exception):
    """``context``: tokens that the cache would hold; ``room``: bytes that it may take."""

    def __init__(self, what: str, why: str, *, context: int = 0, room: int = 0) -> None:
        self.what, self.why, self.context, self.room = what, why, context, room


def plan_memory(
    config: Config, model: ModelSizes, machine: Machine, free_bytes: int, host_bytes: int = 0
) -> MemoryPlan:
    """``free_bytes``: before anything of this engine is in it; ``host_bytes``: of the host, where that could take the
    machine's place. Raises StartupError (HS-E026, exit code 12) with the numbers, and two changes of which each would
    make it fit, where there are any."""
    try:
        return _plan(config, model, machine, free_bytes)
    except _DoesNotFit as failure:
        case = Case(config, model, machine, free_bytes, host_bytes)
        found = fixes(case, _wanted_steps(config, machine), failure.context, failure.room, fits)
        otherwise = "a smaller model, or a machine with more memory"
        raise StartupError("HS-E026", failure.what, failure.why, ", or ".join(found) or otherwise) from None


def fits(case: Case) -> bool:
    try:
        _plan(case.config, case.model, case.machine, case.free_bytes)
    except _DoesNotFit:
        return False
    return True


def check_swap_space(config: Config, machine: Machine, host_bytes: int) -> None:
    """Where it is not a part of the plan. ``host_bytes``: free on the host. Raises StartupError (HS-E026)."""
    if not machine.is_host and config.cache.swap_space * 2**30 > host_bytes:
        what = f"a swap space of {config.cache.swap_space:g} GiB does not fit in the host's memory"
        tenths = max(host_bytes, 0) * 9 // 2**30  # of a GiB; a tenth is left to everything else
        found = [f"--swap-space {gib:g}" for gib in sorted({tenths / 10, 0.0}, reverse=True)]
        raise StartupError("HS-E026", what, f"{_mib(host_bytes)} are free", ", or ".join(found))


def room_for_cache(config: Config, model: ModelSizes, machine: Machine, free_bytes: int) -> int:
    """Bytes that a KV cache could take at most; 0 where not even the model fits."""
    try:
        _, room, _ = _fit_steps(config, model, machine, free_bytes)
    except _DoesNotFit:
        return 0
    return room


def _plan(config: Config, model: ModelSizes, machine: Machine, free_bytes: int) -> MemoryPlan:
    block_size = config.cache.block_size
    steps, room, notes = _fit_steps(config, model, machine, free_bytes)
    num_blocks, cache_notes = _num_blocks(config, model, machine, steps, room)
    notes += cache_notes
    cache_bytes = num_blocks * block_size * model.token_bytes
    max_model_len, blocks_a_context = model.max_model_len, -(-model.max_model_len // block_size)
    if num_blocks < blocks_a_context:
        max_model_len = num_blocks * block_size
        if config.model.max_model_len or max_model_len < min(SHORTEST_CONTEXT, model.max_model_len):
            raise _DoesNotFit(
                f"the KV cache is too small for a context of {model.max_model_len} tokens",
                f"that takes {_mib(blocks_a_context * block_size * model.token_bytes)}, the cache has "
                f"{_mib(cache_bytes)}, the model and its steps {_mib(free_bytes - room)} of {_mib(free_bytes)}",
                context=max_model_len,
                room=room,
            )
        notes.append(f"context limited to {max_model_len} of {model.max_model_len} tokens, as many as the cache holds")
    rows = (
        ("weights", model.weight_bytes),
        ("table of positions", model.rotary_bytes),
        *steps.rows(model, machine, block_size),
        *([("swap space", _swap_bytes(config, machine))] if _swap_bytes(config, machine) else []),
        (f"KV cache, {num_blocks} blocks of {block_size} tokens", cache_bytes),
        ("left free", room - cache_bytes),
    )
    return MemoryPlan(
        num_blocks,
        max_model_len,
        steps.max_num_seqs,
        steps.max_batched_tokens,
        steps.pad_sizes,
        rows,
        tuple(notes),
        model.num_host_blocks(config),
        model.swap_cost(config, machine),
    )


def _fit_steps(
    config: Config, model: ModelSizes, machine: Machine, free_bytes: int
) -> tuple[StepLimits, int, list[str]]:
    """The steps, what they leave to the cache, and what was fitted."""
    left = free_bytes - model.weight_bytes - model.rotary_bytes - _swap_bytes(config, machine)
    if left < 0:
        parts = [f"its weights take {_mib(model.weight_bytes)}", f"its table of positions {_mib(model.rotary_bytes)}"]
        if swap := _swap_bytes(config, machine):
            parts.append(f"the swap space {_mib(swap)}")
        raise _DoesNotFit("the model does not fit in memory", f"{', '.join(parts)}; {_mib(free_bytes)} are free")
    wanted = _wanted_steps(config, machine)

    def num_bytes(steps: StepLimits) -> int:
        return steps.num_bytes(model, machine, config.cache.block_size)

    steps = wanted
    while num_bytes(steps) > SHARE_OF_STEPS * left and (smaller := list(_smaller(config, steps))):
        steps = min(smaller, key=num_bytes)
    if num_bytes(steps) > left:
        raise _DoesNotFit(
            f"steps of {steps.max_batched_tokens} tokens and {steps.max_num_seqs} requests do not fit in memory",
            f"they take {_mib(num_bytes(steps))}, the model leaves {_mib(left)} of {_mib(free_bytes)}",
        )
    changes = [
        f"{name} {now} instead of {before}"
        for name, now, before in (
            ("max_num_seqs", steps.max_num_seqs, wanted.max_num_seqs),
            ("max_num_batched_tokens", steps.max_batched_tokens, wanted.max_batched_tokens),
            ("graphs of up to", steps.largest_captured, wanted.largest_captured),
        )
        if now != before
    ]
    notes = [", ".join(changes) + f", as the model leaves {_mib(left)}"] if changes else []
    return steps, left - num_bytes(steps), notes


def _swap_bytes(config: Config, machine: Machine) -> int:
    """Of the memory that is planned; a GPU's swap space is not in its own."""
    return int(config.cache.swap_space * 2**30) if machine.is_host else 0


def _wanted_steps(config: Config, machine: Machine) -> StepLimits:
    scheduler = config.scheduler
    seqs = scheduler.max_num_seqs or MAX_NUM_SEQS
    tokens = scheduler.max_num_batched_tokens or max(machine.batched_tokens, seqs)
    if not scheduler.max_num_seqs:
        seqs = min(seqs, tokens)
    return StepLimits(seqs, tokens, tokens if machine.captures and not config.engine.enforce_eager else 0)


def _smaller(config: Config, steps: StepLimits) -> Iterator[StepLimits]:
    """With one of the sizes that were left open halved."""
    seqs, tokens, captured = steps.max_num_seqs // 2, steps.max_batched_tokens // 2, steps.largest_captured // 2
    if not config.scheduler.max_num_seqs and seqs >= FEWEST_SEQS:
        yield replace(steps, max_num_seqs=seqs)
    if not config.scheduler.max_num_batched_tokens and tokens >= max(FEWEST_TOKENS, steps.max_num_seqs):
        yield replace(steps, max_batched_tokens=tokens, max_captured_tokens=min(tokens, steps.max_captured_tokens))
    if captured >= FEWEST_CAPTURED:
        yield replace(steps, max_captured_tokens=captured)


def _num_blocks(
    config: Config, model: ModelSizes, machine: Machine, steps: StepLimits, room: int
) -> tuple[int, list[str]]:
    cache, notes = config.cache, list[str]()
    block_bytes = cache.block_size * model.token_bytes
    blocks_a_context = -(-model.max_model_len // cache.block_size)
    if cache.num_gpu_blocks_override > 0:
        num_blocks = cache.num_gpu_blocks_override
    elif cache.kv_cache_memory_bytes > 0:
        num_blocks = cache.kv_cache_memory_bytes // block_bytes
    elif machine.takes_all:
        num_blocks = room // block_bytes
    else:
        wanted = max(DEFAULT_FULL_CONTEXTS * blocks_a_context, DEFAULT_CACHE_BYTES // block_bytes)
        affordable = int(room * SHARE_OF_FREE) // block_bytes
        num_blocks = min(wanted, affordable, steps.max_num_seqs * blocks_a_context)
        if affordable < wanted and num_blocks == affordable:
            share = f"{SHARE_OF_FREE:.0%} of the free memory"
            notes.append(f"KV cache limited to {_mib(num_blocks * block_bytes)}, {share}")
    if num_blocks * block_bytes > room:
        raise _DoesNotFit(
            f"a KV cache of {_mib(num_blocks * block_bytes)} does not fit",
            f"{num_blocks} blocks of {block_bytes} bytes; {_mib(room)} are free beside the model and its steps",
            room=room,
        )
    return num_blocks, notes


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.0f} MiB" if num_bytes >= 10 * MIB else f"{max(num_bytes, 0) / 1024:.0f} KiB"
