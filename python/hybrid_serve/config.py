"""The configuration: frozen dataclasses whose fields are the only list of options.

A field is a flag (``--max-num-seqs``), an environment variable (``HYBRID_SERVE_MAX_NUM_SEQS``) and a YAML key
(``max_num_seqs``): cli/options.py derives all three. Names are vLLM's wherever the meaning is the same.
Knows no torch, no socket; every process of a server gets the same ``Config`` as JSON.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec


@dataclass(frozen=True)
class Option:
    """What the command line needs beyond a field's name, type and default."""

    help: str
    metavar: str | None = None
    short: str | None = None  # "-x" or another long spelling
    common: bool = False  # listed by plain --help; the others by --help=all
    secret: bool = False  # masked wherever the configuration is shown


LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: Annotated[str, Option("local folder, GGUF file or hub id", common=True)] = ""
    served_model_name: Annotated[
        tuple[str, ...], Option("name(s) clients use; default: the model as given", "NAME", common=True)
    ] = ()
    tokenizer: Annotated[str, Option("folder or hub id of the tokenizer; default: the model's own")] = ""
    revision: Annotated[str, Option("hub branch, tag or commit")] = ""
    download_dir: Annotated[str, Option("where hub files are kept; default: the hub library's cache")] = ""
    load_format: Annotated[LoadFormat, Option("auto: by the files found; dummy: random weights from config.json")] = (
        "auto"
    )
    dtype: Annotated[
        DTypeName, Option("type of weights and cache; auto: the checkpoint's, quantised ones in bfloat16", common=True)
    ] = "auto"
    max_model_len: Annotated[
        int, Option("longest prompt + reply in tokens; 0: the model's own, or less if memory demands it", common=True)
    ] = 0
    seed: Annotated[int, Option("seed of dummy weights and of requests without one; -1: from the system")] = -1
    chat_template: Annotated[str, Option("Jinja file, or the template itself; default: the model's own")] = ""


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: Annotated[int, Option("tokens a block: 16, 32 or 64")] = 16
    num_gpu_blocks_override: Annotated[int, Option("number of KV blocks; 0: by memory", "N")] = 0
    kv_cache_memory_bytes: Annotated[
        int, Option("bytes of KV cache, e.g. 2GiB; 0: a share of free memory", "SIZE", common=True)
    ] = 0
    enable_prefix_caching: Annotated[bool, Option("reuse the KV of equal prompt beginnings")] = True


@dataclass(frozen=True)
class SchedulerConfig:
    """How requests share the steps."""

    max_num_seqs: Annotated[int, Option("requests that run at once", common=True)] = 256
    max_num_batched_tokens: Annotated[int, Option("token budget of a step; 0: by device", common=True)] = 0
    max_num_queued_reqs: Annotated[int, Option("requests that may wait before new ones get 503; 0: no limit")] = 1024


@dataclass(frozen=True)
class EngineConfig:
    """The machine under the model."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Option("auto: CUDA where it is, else CPU", common=True)] = "auto"
    cpu_threads: Annotated[int, Option("threads of the CPU kernels; 0: one per usable core")] = 0


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP side."""

    host: Annotated[str, Option("address to bind", common=True)] = "127.0.0.1"
    port: Annotated[int, Option("port to bind; 0: any free one", common=True)] = 8000
    api_key: Annotated[
        tuple[str, ...], Option("key(s) clients must send as a bearer token", "KEY", common=True, secret=True)
    ] = ()
    insecure_no_auth: Annotated[bool, Option("allow a host other than loopback without a key")] = False
    root_path: Annotated[str, Option("path prefix that a proxy in front strips")] = ""
    max_request_bytes: Annotated[int, Option("largest request body, e.g. 16MiB", "SIZE")] = 16 * 2**20
    max_logprobs: Annotated[int, Option("largest top_logprobs a request may ask for")] = 20
    strict_requests: Annotated[bool, Option("unknown or unused request fields are a 400, not a response header")] = (
        False
    )
    sse_keep_alive_interval: Annotated[float, Option("seconds between comment lines on a silent stream; 0: none")] = (
        15.0
    )
    shutdown_timeout: Annotated[float, Option("seconds that running requests get to finish after SIGTERM")] = 30.0
    log_level: Annotated[LogLevel, Option("least level that is logged")] = "info"
    metrics_prefix: Annotated[str, Option("prefix of the metrics that vLLM dashboards query")] = "vllm:"


@dataclass(frozen=True)
class Config:
    """All of it; what a process is started with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(data: bytes) -> Config:
        return msgspec.json.decode(data, type=Config)

    def digest(self) -> str:
        """Equal in two processes exactly if they were started with the same configuration."""
        return hashlib.sha256(self.to_json()).hexdigest()[:16]
