"""``fit [MODEL]``: what a start would do with the memory there is, and what else would fit; reads config.json alone.

The arithmetic is the engine's own (runner/limits.py): what this prints is what a start will do.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint import demo
from ..checkpoint.checkpoint import open_checkpoint
from ..checkpoint.hub import resolve_metadata
from ..checkpoint.model_spec import ModelSpec
from ..config import Config
from ..errors import StartupError, box
from ..models import family_of
from ..models.names import expected_tensors
from ..runner import limits, memory
from . import options
from .collect_env import output_lines
from .settings import settings
from .usage import Parser, UsageError, dashed

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHARE_FOR_CACHE = 0.9  # of what weights and activations leave
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
    config = options.parse(rest, os.environ).config
    free = memory.free_bytes() if arguments.memory is None else _size(arguments.memory)
    try:
        config = replace(config, model=demo.unless_named(config.model))
        resolved = resolve_metadata(config.model)
        model = Model.of(config, open_checkpoint(resolved, with_tensors=False).spec)
        plan: limits.MemoryPlan | None = None
        failure: StartupError | None = None
        try:
            plan = _plan(config, model, free)
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


@dataclass(frozen=True)
class Model:
    """The sizes that memory is counted by."""

    spec: ModelSpec
    dtype: str
    max_model_len: int
    num_parameters: int
    weight_bytes: int
    token_bytes: int  # of KV cache
    activation_bytes: int  # of the largest step

    @classmethod
    def of(cls, config: Config, spec: ModelSpec) -> Model:
        """Raises StartupError (HS-E024) for a context that the model does not have."""
        dtype = spec.dtype if config.model.dtype == "auto" else config.model.dtype
        item = _ITEM_BYTES[dtype]
        count = sum(math.prod(shape) for _, shape in expected_tensors(spec, family_of(spec)))
        length = limits.longest_context(spec, config.model.max_model_len)
        token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * item
        scheduler = config.scheduler
        step = scheduler.max_num_batched_tokens or max(limits.CPU_BATCHED_TOKENS, scheduler.max_num_seqs)
        activations = limits.activation_bytes(spec, item, step, scheduler.max_num_seqs)
        return cls(spec, dtype, length, count, count * item, token_bytes, activations)


def _plan(config: Config, model: Model, free: int) -> limits.MemoryPlan:
    """Raises StartupError (HS-E026), as a start would."""
    limits.check_weights_fit(model.weight_bytes, free)
    return limits.plan_memory(
        config.cache,
        weight_bytes=model.weight_bytes,
        activation_bytes=model.activation_bytes,
        block_bytes=config.cache.block_size * model.token_bytes,
        max_model_len=model.max_model_len,
        is_length_fixed=config.model.max_model_len > 0,
        max_num_seqs=config.scheduler.max_num_seqs,
        free_bytes=free - model.weight_bytes - model.activation_bytes,
    )


def _facts(config: Config, model: Model, free: int, plan: limits.MemoryPlan | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": config.model.model,
        "family": model.spec.family,
        "parameters": model.num_parameters,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "weight_bytes": model.weight_bytes,
        "kv_bytes_per_token": model.token_bytes,
        "free_bytes": free,
        "activation_bytes": model.activation_bytes,
        "free_after_weights_bytes": max(free - model.weight_bytes, 0),
        "start": None,
        "choices": _choices(config, model, _for_cache(model, free)),
        "gpus": [
            {"name": name, "free_bytes": gpu_free, "choices": _choices(config, model, _for_cache(model, gpu_free))}
            for name, gpu_free in gpus()
        ],
    }
    if plan is not None:
        num_tokens = plan.num_blocks * config.cache.block_size
        found["start"] = {
            "max_model_len": plan.max_model_len,
            "kv_cache_bytes": num_tokens * model.token_bytes,
            "requests_of_that_length": num_tokens // plan.max_model_len,
            "notes": list(plan.notes),
        }
    return found


def _for_cache(model: Model, free: int) -> int:
    return int(max(free - model.weight_bytes - model.activation_bytes, 0) * _SHARE_FOR_CACHE)


def gpus() -> list[tuple[str, int]]:
    """(name, free bytes) of each that is visible."""
    found = []
    for line in output_lines(["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]):
        name, _, mib = line.rpartition(",")
        if mib.strip().isdigit():
            found.append((name, int(mib) * 2**20))
    return found


def _choices(config: Config, model: Model, cache_bytes: int) -> list[dict[str, Any]]:
    """For the longest context and each half of it: how many requests of that length the memory holds, and the flags."""
    rows, length = [], model.max_model_len
    while length >= min(_SHORTEST_ROW, model.max_model_len):
        blocks = -(-length // config.cache.block_size)
        one = blocks * config.cache.block_size * model.token_bytes
        if count := cache_bytes // one:
            # Rounded up to whole MiB, so that what the flag says holds what the row says.
            mib = -(-count * one // 2**20)
            flags = f"--max-model-len {length} --kv-cache-memory-bytes {mib}MiB"
            if count > config.scheduler.max_num_seqs:
                flags += f" --max-num-seqs {count}"
            rows.append({"context": length, "requests": count, "kv_cache_bytes": count * one, "flags": flags})
        length //= 2
    return rows


def _text(found: dict[str, Any]) -> str:
    lines = [
        f"model    {found['family']}, {found['parameters'] / 1e9:.2f} B parameters, {found['dtype']}, "
        f"context {found['max_model_len']}",
        f"weights  {_gib(found['weight_bytes'])}     activations {_gib(found['activation_bytes'])}     "
        f"KV cache {found['kv_bytes_per_token'] / 1024:.1f} KiB a token",
        f"memory   {_gib(found['free_bytes'])} free, {_gib(found['free_after_weights_bytes'])} after the weights",
    ]
    if start := found["start"]:
        lines.append(
            f"start    context {start['max_model_len']} x {start['requests_of_that_length']} requests, "
            f"KV cache {_gib(start['kv_cache_bytes'])}"
        )
        lines += [f"         {note}" for note in start["notes"]]
    if found["choices"]:
        lines.append("most that fits:")
        for row in found["choices"]:
            size = f"{row['context']:>7} x {row['requests']:>5} requests = {_gib(row['kv_cache_bytes']):>9}"
            lines.append(f"  context {size}   {row['flags']}")
    for index, gpu in enumerate(found["gpus"]):
        best = gpu["choices"][0] if gpu["choices"] else None
        verdict = f"context {best['context']} x {best['requests']} requests at most" if best else "does not fit"
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
