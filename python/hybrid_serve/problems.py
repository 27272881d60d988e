"""What no server could be started with: a value out of its range, options that contradict each other.

Knows values only. Whether the model exists or the port is free is found out by whoever opens it.
"""

from __future__ import annotations

import re
from dataclasses import fields

from .config import Config, ParallelConfig, RoutingConfig, ServerConfig
from .ranges import RANGES


def problems(config: Config) -> list[tuple[str, str]]:
    """(field, what is wrong with it) for each; empty: nothing."""
    found: list[tuple[str, str]] = []
    for group in fields(config):
        for name, value in vars(getattr(config, group.name)).items():
            low, high = RANGES.get(name, (value, value))
            # Written so that NaN, which compares false with everything, is outside.
            if not isinstance(value, bool) and not low <= value <= high:
                found.append((name, f"is {value}, must be {low} to {high}"))
            texts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(text, str) and name != "chat_template" and not text.isprintable() for text in texts):
                found.append((name, "has a control character or a line break in it"))
    found += _model_and_cache_problems(config) + _parallel_problems(config) + _routing_problems(config)
    return found + _server_problems(config.server)


def _model_and_cache_problems(config: Config) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if any(not name.strip() for name in config.model.served_model_name):
        found.append(("served_model_name", "has an empty name"))
    if config.cache.block_size not in (16, 32, 64):
        found.append(("block_size", f"is {config.cache.block_size}, must be 16, 32 or 64"))
    if config.cache.num_gpu_blocks_override and config.cache.kv_cache_memory_bytes:
        found.append(("num_gpu_blocks_override", "and kv_cache_memory_bytes both set the size of the cache, give one"))
    return found


def _parallel_problems(config: Config) -> list[tuple[str, str]]:
    """Combinations of the modes that make no sense; ``ParallelConfig`` says what each mode is."""
    parallel, ranks = config.parallel, config.parallel.local_ranks
    is_external, is_hybrid = parallel.data_parallel_rank >= 0, parallel.data_parallel_hybrid_lb
    size, headless, is_ray = parallel.data_parallel_size, parallel.headless, parallel.is_ray
    is_outside = bool(ranks) and ranks[-1] >= size and not (headless and size == 1)  # headless need not know the size
    found: list[tuple[str, str]] = []
    if parallel.data_parallel_external_lb and not is_external:
        found.append(("data_parallel_rank", "is needed with data_parallel_external_lb: it says whose server this is"))
    if is_external and (is_hybrid or parallel.data_parallel_size_local > 1):
        found.append(("data_parallel_rank", "is for a server with one engine: no hybrid_lb, no size_local above 1"))
    if headless and (is_external or is_hybrid):
        found.append(("headless", "engines have no API server that data_parallel_rank or hybrid_lb could be about"))
    if headless and config.server.api_server_count > 1:
        found.append(("headless", f"means no API servers, api_server_count is {config.server.api_server_count}"))
    if not ranks and (headless or is_hybrid):
        found.append(("data_parallel_size_local", "is 0: there would be no engine"))
    if is_outside:
        found.append(("data_parallel_size", f"is {size}, but this machine has ranks {list(ranks)}"))
    if parallel.data_parallel_start_rank > 0 and not (headless or is_hybrid or is_external):
        found.append(("headless", "or data_parallel_hybrid_lb is needed with data_parallel_start_rank: a head has 0"))
    if (headless or (parallel.remote_ranks and not is_ray)) and not parallel.data_parallel_key_file:
        found.append(("data_parallel_key_file", "is needed for engines on several machines: hybrid-serve keys FILE"))
    if is_ray and (headless or is_hybrid or is_external or parallel.data_parallel_size_local >= 0):
        found.append(("data_parallel_backend", "is ray, which places all engines: no headless, _lb, rank, size_local"))
    if not parallel.data_parallel_address:
        found.append(("data_parallel_address", "is empty, use 127.0.0.1 for this machine only"))
    return found


def _routing_problems(config: Config) -> list[tuple[str, str]]:
    routing, model, parallel = config.routing, config.model, config.parallel
    if not routing.models:
        return [] if routing == RoutingConfig() else [("models", "is needed with a limit for loaded models")]
    found: list[tuple[str, str]] = []
    if model.model or model.served_model_name:
        found.append(("models", "names all models, as clients do: no MODEL and no served_model_name beside it"))
    executor = () if parallel.is_ray else ("distributed_executor_backend",)
    set_ones = {name for name, value in vars(parallel).items() if value != getattr(ParallelConfig(), name)}
    for name in sorted(set_ones - {"data_parallel_size", "data_parallel_prefix_affinity", *executor}):
        found.append((name, "is not for a server of several models, whose engines are all on its machine"))
    return found


def _server_problems(server: ServerConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    # The key itself must not appear in the message: it would end in a log. An empty key is often an unset variable.
    for name, keys in (("api_key", server.api_key), ("admin_api_key", server.admin_api_key)):
        if any(not key.strip() for key in keys):
            found.append((name, "has an empty key, which would let everyone in"))
        elif any(not key.isascii() or any(char.isspace() for char in key) for key in keys):
            found.append((name, "has a key with a space or a non-ASCII character, which no HTTP header can carry"))
    if set(server.api_key) & set(server.admin_api_key):
        found.append(("admin_api_key", "is also an api_key, whose holders would be admins"))
    if not server.host:
        found.append(("host", "is empty, use 127.0.0.1 for this machine only or 0.0.0.0 for all addresses"))
    elif not (server.uds or is_loopback(server.host) or server.asks_for_keys or server.insecure_no_auth):
        found.append(("host", f"{server.host} is open to other machines: set api_key, or insecure_no_auth to allow it"))
    if server.allow_credentials and "*" in server.allowed_origins:
        found.append(
            ("allow_credentials", "with the origin * would let every web page act as its visitor: name origins")
        )
    if server.root_path and (not server.root_path.startswith("/") or server.root_path.endswith("/")):
        found.append(("root_path", f"is {server.root_path!r}, must begin with / and not end with it"))
    if not re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)?", server.metrics_prefix):
        found.append(("metrics_prefix", f"is {server.metrics_prefix!r}, must be letters, digits, _ and : only"))
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to ``host``. Looks no name up: only localhost is known."""
    from ipaddress import ip_address

    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def validate(config: Config) -> Config:
    """The configuration itself. Raises ValueError that names every problem."""
    if found := problems(config):
        raise ValueError("; ".join(f"{name} {wrong}" for name, wrong in found))
    return config
