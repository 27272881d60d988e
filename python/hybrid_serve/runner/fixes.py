"""Which flags would make fit what does not: each is tried out on the plan before anybody is told of it. Knows options
and values for them, not what they cost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations, groupby
from operator import itemgetter
from typing import Any

from ..config import Config
from .sizes import CPU, Machine, ModelSizes, StepLimits

SHORTEST_CONTEXT = 256  # a server with less than this is of no use; better to say so
HIGHEST_UTILIZATION = 0.97
NUM_FIXES = 2

Change = Mapping[str, Any]  # option -> value
Options = Mapping[str, list[Any]]  # option -> values for it, the least change first
Helps = Callable[[Change], bool]
# The options that may help, the one whose change costs least first, and their groups.
_GROUPS = {
    "kv_cache_memory_bytes": "cache",
    "num_gpu_blocks_override": "cache",
    "max_model_len": "model",
    "gpu_memory_utilization": "cache",
    "swap_space": "cache",
    "max_num_batched_tokens": "scheduler",
    "max_num_seqs": "scheduler",
    "enforce_eager": "engine",
    "dtype": "model",
    "kv_cache_dtype": "cache",
    "device": "engine",
}


@dataclass(frozen=True)
class Case:
    """What a plan is made from. ``free_bytes``: of the machine; ``host_bytes``: of the host, if that is another one and
    may be used instead."""

    config: Config
    model: ModelSizes
    machine: Machine
    free_bytes: int
    host_bytes: int = 0

    def with_change(self, change: Change) -> Case:
        config, machine, free = self.config, self.machine, self.free_bytes
        for name, value in change.items():
            group = _GROUPS[name]
            config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
        share = config.cache.gpu_memory_utilization - self.config.cache.gpu_memory_utilization
        free += int(share * machine.total_bytes)
        if config.engine.device == "cpu" and not machine.is_host:
            machine, free = CPU, self.host_bytes
        same = config.model == self.config.model and config.cache.kv_cache_dtype == self.config.cache.kv_cache_dtype
        model = self.model if same else ModelSizes.of(config, self.model.spec)
        return Case(config, model, machine, free, self.host_bytes)


def fixes(case: Case, steps: StepLimits, context: int, room: int, fits: Callable[[Case], bool]) -> list[str]:
    """Up to two alternatives, as one writes them; none: no option helps. ``steps``: what was wanted; ``context``:
    tokens that the cache would hold; ``room``: bytes that it may take."""
    options: dict[str, list[Any]] = {}
    for name, value in _candidates(case, steps, context, room):
        options.setdefault(name, []).append(value)

    def helps(change: Change) -> bool:
        changed = case.with_change(change)
        tokens, seqs = changed.config.scheduler.max_num_batched_tokens, changed.config.scheduler.max_num_seqs
        return not 0 < tokens < seqs and fits(changed)

    each: list[Change] = [{name: value} for name, values in options.items() for value in values]
    alone = [change for change in each if helps(change)]
    elsewhere: list[Change] = [{"device": "cpu"}] if case.host_bytes else []
    many = () if alone else _many(options, helps)
    found: list[Change] = []
    last = chain(filter(helps, elsewhere), filter(helps, _further(options, found)))
    for change in chain(_first_of_each(alone), _pairs(options, alone, helps), many, last):
        found += [change] if change not in found else []
        if len(found) == NUM_FIXES:
            break
    return [as_flags(change) for change in found]


def _first_of_each(changes: list[Change]) -> Iterator[Change]:
    for _, same in groupby(changes, key=list):
        yield next(same)


def _pairs(options: Options, alone: list[Change], helps: Helps) -> Iterator[Change]:
    """Two options together, each changed by less than what would help alone: the least change first."""
    less = {name: [v for v in values if {name: v} not in alone] for name, values in options.items()}
    others: list[Change] = []
    for a, b in combinations([name for name, values in less.items() if values], 2):
        found: list[tuple[int, Change]] = []
        for i, first in enumerate(less[a]):
            changes: list[Change] = [{a: first, b: second} for second in less[b]]
            j = bisect_left(changes, True, key=helps)  # more of the second one helps more
            if j < len(changes) and helps(changes[j]):
                found.append((i + j, changes[j]))
        found.sort(key=itemgetter(0))
        yield from (change for _, change in found[:1])
        others += [change for _, change in found[1:]]
    yield from others


def _many(options: Options, helps: Helps) -> Iterator[Change]:
    """All options as far as they go, and then back as far as that fits: the first ones first, then the last ones."""
    for names in ([*options], [*options][::-1]):
        change: Change = {name: options[name][-1] for name in options}
        is_smaller = helps(change)
        while is_smaller:  # what one gives back may let another give back more
            is_smaller = False
            for name in [name for name in names if name in change]:
                others = {other: value for other, value in change.items() if other != name}
                milder = options[name][: options[name].index(change[name])]
                back = next(filter(helps, [others, *({**change, name: value} for value in milder)]), None)
                if back is not None:
                    change, is_smaller = back, True
            if not is_smaller:
                yield change


def _further(options: Options, found: list[Change]) -> Iterator[Change]:
    """What was found, with one option changed by more."""
    for change in found[:1]:
        for name in [name for name in change if name in options]:
            yield from ({**change, name: value} for value in options[name][options[name].index(change[name]) + 1 :])


def _candidates(case: Case, steps: StepLimits, context: int, room: int) -> Iterator[tuple[str, Any]]:
    """(option, value), the least change of each option first."""
    config, model, machine = case.config, case.model, case.machine
    cache = config.cache
    block_bytes = cache.block_size * model.token_bytes
    fitting, wanted = room // block_bytes, -(-model.max_model_len // cache.block_size)
    if cache.num_gpu_blocks_override:  # the size is set by one of the two
        too_large = cache.num_gpu_blocks_override > fitting
        for num_blocks in (*((fitting, wanted) if too_large else (wanted, fitting)), 0):
            yield "num_gpu_blocks_override", num_blocks
    elif cache.kv_cache_memory_bytes or not machine.takes_all:
        one, most = _round(wanted * block_bytes, up=True), _round(room, up=False)
        for num_bytes in (*((most, one) if cache.kv_cache_memory_bytes > room else (one, most)), 0):
            yield "kv_cache_memory_bytes", num_bytes
    lengths = (context, fitting * cache.block_size, *(model.max_model_len >> shift for shift in range(1, 24)))
    for tokens in sorted({n for n in lengths if SHORTEST_CONTEXT <= n < model.max_model_len or n == context > 1})[::-1]:
        yield "max_model_len", tokens
    if machine.total_bytes:
        for percent in range(int(cache.gpu_memory_utilization * 100) + 1, int(HIGHEST_UTILIZATION * 100) + 1):
            yield "gpu_memory_utilization", percent / 100
    if machine.is_host and cache.swap_space:
        for swap_space in (*(cache.swap_space / 2**shift for shift in range(1, 16)), 0.0):
            if swap_space >= 0.001 or not swap_space:
                yield "swap_space", round(swap_space, 3)
    for shift in range(1, 24):
        if (tokens := steps.max_batched_tokens >> shift) >= 16:
            yield "max_num_batched_tokens", tokens
        if seqs := steps.max_num_seqs >> shift:
            yield "max_num_seqs", seqs
    if machine.captures and not config.engine.enforce_eager:
        yield "enforce_eager", True
    if model.item_bytes > 2:
        yield "dtype", "bfloat16"
    if cache.kv_cache_dtype == "auto" and (machine.is_host or model.spec.head_dim % 16 == 0):  # as kernels have it
        yield "kv_cache_dtype", "fp8"


def _round(num_bytes: int, *, up: bool) -> int:
    unit = 2**20 if num_bytes >= 2**24 else 2**10
    return -(-num_bytes // unit) * unit if up else num_bytes // unit * unit


def as_flags(change: Change) -> str:
    return " ".join(_as_flag(name, value) for name, value in change.items())


def _as_flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    if name == "kv_cache_memory_bytes" and value:
        unit, size = ("MiB", 2**20) if value % 2**20 == 0 else ("KiB", 2**10)
        return f"{flag} {value // size}{unit}"
    return f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}"
