"""``fit [MODEL]``: what a start would do with the memory there is, and what else would fit; reads config.json alone.

The arithmetic is the engine's own (runner/limits.py): what this prints is what a start will do.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

from ..checkpoint import demo
from ..checkpoint.checkpoint import open_checkpoint
from ..checkpoint.hub import resolve_metadata
from ..config import MAX_NUM_SEQS, Config
from ..errors import StartupError, box
from ..runner import limits, memory, sizes
from ..runner.fixes import Case, as_flags
from ..runner.sizes import Machine, ModelSizes
from . import options
from .collect_env import output_lines
from .settings import settings
from .usage import Parser, UsageError, dashed

_SHARE_FOR_CACHE = 0.9  # of what the model and its steps leave
_SHORTEST_ROW = 1024  # tokens; the table of contexts ends there
_GIB = 2**30


def fit(argv: list[str]) -> int:
    """0: a start with these options would fit; 12 and a box: it would not; others as of ``serve``."""
    parser = Parser(
        "hybrid-serve fit",
        "Says what fits in memory, from config.json (of a hub id only that is downloaded) or a GGUF file's header.",
        "Further words are those of serve: a MODEL and its options, which are taken into account.",
    )
    parser.usage = "hybrid-serve fit [MODEL] [OPTION ...]"
    parser.add_argument(
        "--memory", metavar="SIZE", help="free memory to count with, such as 24GiB; default: what is free here"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    arguments, rest = parser.parse_known_args(dashed(argv))
    config = options.for_one_model(options.parse(rest, os.environ).config)
    free = memory.free_bytes() if arguments.memory is None else _size(arguments.memory)
    try:
        config = replace(config, model=demo.unless_named(config.model))
        resolved = resolve_metadata(config.model)
        model = ModelSizes.of(config, open_checkpoint(resolved, with_tensors=False).spec)
        plan: limits.MemoryPlan | None = None
        failure: StartupError | None = None
        try:
            plan = limits.plan_memory(config, model, sizes.CPU, free)
        except StartupError as error:
            failure = error
        found = _facts(config, model, free, plan)
        print(json.dumps(found, indent=1) if arguments.json else _text(found))
        if failure is not None:
            raise failure
    except StartupError as error:
        print(box(error.failure), file=sys.stderr)
        return error.failure.exit_code
    return 0


def _facts(config: Config, model: ModelSizes, free: int, plan: limits.MemoryPlan | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": config.model.model,
        "family": model.spec.family,
        "parameters": model.num_parameters,
        "dtype": model.dtype,
        "kv_cache_dtype": model.cache_dtype,
        "max_model_len": model.max_model_len,
        "weight_bytes": model.weight_bytes,
        "kv_bytes_per_token": model.token_bytes,
        "free_bytes": free,
        "free_after_weights_bytes": max(free - model.weight_bytes, 0),
        "start": None,
        "choices": _choices(config, model, sizes.CPU, free),
        "gpus": [_verdict(config, model, *gpu, free) for gpu in gpus(config)],
    }
    if plan is not None:
        num_tokens = plan.num_blocks * config.cache.block_size
        found["start"] = {
            "max_model_len": plan.max_model_len,
            "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.max_batched_tokens,
            "kv_cache_bytes": num_tokens * model.token_bytes,
            "requests_of_that_length": num_tokens // plan.max_model_len,
            "notes": list(plan.notes),
            "memory": dict(plan.rows),
        }
    return found


def _verdict(
    config: Config, model: ModelSizes, name: str, total: int, gpu_free: int, usable: int, host_free: int
) -> dict[str, Any]:
    """Of one GPU. ``fix``: of the start that it would refuse; empty where it would not."""
    machine, fix = sizes.CUDA._replace(total_bytes=total), ""
    try:
        limits.plan_memory(config, model, machine, usable, host_free)
    except StartupError as error:
        fix = error.failure.fix
    return {"name": name, "free_bytes": gpu_free, "choices": _choices(config, model, machine, usable), "fix": fix}


def gpus(config: Config) -> list[tuple[str, int, int, int]]:
    """(name, bytes, free ones, those of them that may be used) of each that is visible."""
    found = []
    for line in output_lines(
        ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    ):
        name, *mib = line.rsplit(",", 2)
        if len(mib) == 2 and all(word.strip().isdigit() for word in mib):
            total, free = (int(word) * 2**20 for word in mib)
            found.append((name, total, free, int(free - total * (1 - config.cache.gpu_memory_utilization))))
    return found


def _choices(config: Config, model: ModelSizes, machine: Machine, free: int) -> list[dict[str, Any]]:
    """For the longest context and each half of it: how many requests of that length the memory holds, and the flags
    with which a start holds them."""
    cache_bytes = int(limits.room_for_cache(config, model, machine, free) * _SHARE_FOR_CACHE)
    rows, length = [], model.max_model_len
    while length >= min(_SHORTEST_ROW, model.max_model_len):
        blocks = -(-length // config.cache.block_size)
        one = blocks * config.cache.block_size * model.token_bytes
        count = min(cache_bytes // one, config.scheduler.max_num_batched_tokens or 2**16)
        while count:
            # Rounded up to whole MiB, so that what the flag says holds what the row says.
            change = {"max_model_len": length, "kv_cache_memory_bytes": -(-count * one // 2**20) * 2**20}
            if count > (config.scheduler.max_num_seqs or MAX_NUM_SEQS):
                change["max_num_seqs"] = count
            if limits.fits(Case(config, model, machine, free).with_change(change)):
                rows.append(
                    {"context": length, "requests": count, "kv_cache_bytes": count * one, "flags": as_flags(change)}
                )
                break
            count = count * 3 // 4  # the more run at once, the more their steps take
        length //= 2
    return rows


def _text(found: dict[str, Any]) -> str:
    lines = [
        f"model    {found['family']}, {found['parameters'] / 1e9:.2f} B parameters, {found['dtype']}, "
        f"context {found['max_model_len']}",
        f"weights  {_gib(found['weight_bytes'])}     KV cache {found['kv_bytes_per_token'] / 1024:.1f} KiB a "
        f"token, {found['kv_cache_dtype']}",
        f"memory   {_gib(found['free_bytes'])} free, {_gib(found['free_after_weights_bytes'])} after the weights",
    ]
    if start := found["start"]:
        lines.append(
            f"start    context {start['max_model_len']} x {start['requests_of_that_length']} requests, "
            f"KV cache {_gib(start['kv_cache_bytes'])}"
        )
        lines += [f"         {_gib(num_bytes):>10}  {what}" for what, num_bytes in start["memory"].items()]
        lines += [f"         {note}" for note in start["notes"]]
    if found["choices"]:
        lines.append("most that fits:")
        for row in found["choices"]:
            size = f"{row['context']:>7} x {row['requests']:>5} requests = {_gib(row['kv_cache_bytes']):>9}"
            lines.append(f"  context {size}   {row['flags']}")
    for index, gpu in enumerate(found["gpus"]):
        best = gpu["choices"][0] if gpu["choices"] else None
        verdict = f"context {best['context']} x {best['requests']} requests at most" if best else "does not fit"
        if gpu["fix"]:
            verdict += f"; a start with these options needs {gpu['fix']}"
        lines.append(f"gpu {index}    {gpu['name']}, {_gib(gpu['free_bytes'])} free: {verdict}")
    return "\n".join(lines)


def _size(text: str) -> int:
    """As `--kv-cache-memory-bytes` reads it. Raises UsageError."""
    setting = next(setting for setting in settings() if setting.name == "kv_cache_memory_bytes")
    try:
        return int(setting.value(text))
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
