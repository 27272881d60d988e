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
KvCacheDType = Literal["auto", "fp8", "fp8_e4m3"]
PrefixCacheScope = Literal["auto", "key", "global"]
LogFormat = Literal["text", "json"]
AccessLog = Literal["off", "errors", "all"]
LogRequests = Literal["off", "meta", "prompt", "full"]
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
        int, Option("longest prompt + reply; auto: the model's own or what memory allows", "N|auto", common=True)
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
    gpu_memory_utilization: Annotated[
        float, Option("share of the GPU's memory that may be used, by all of this process", common=True)
    ] = 0.9
    kv_cache_dtype: Annotated[
        KvCacheDType, Option("type of keys and values; auto: the model's; fp8, fp8_e4m3: half the bytes, less exact")
    ] = "auto"
    enable_prefix_caching: Annotated[bool, Option("reuse the KV of equal prompt beginnings")] = True
    swap_space: Annotated[
        float, Option("GiB of the host's memory for the KV of preempted requests; 0: it is computed again", "GIB")
    ] = 0.0


@dataclass(frozen=True)
class SchedulerConfig:
    """How requests share the steps."""

    max_num_seqs: Annotated[
        int, Option("requests that run at once; auto: 256, or fewer where memory is short", "N|auto", common=True)
    ] = 0
    max_num_batched_tokens: Annotated[
        int, Option("token budget of a step; auto: by device, less where memory is short", "N|auto", common=True)
    ] = 0
    max_num_queued_reqs: Annotated[int, Option("requests that may wait before new ones get 503; 0: no limit")] = 1024
    max_queue_time_s: Annotated[float, Option("seconds that a request may wait for a place; 0: any", "SECONDS")] = 0.0
    ttft_slo_ms: Annotated[float, Option("milliseconds to a request's first token, at most; 0: any", "MS")] = 0.0
    deadline_s: Annotated[float, Option("seconds for a whole reply, at most; 0: any number", "SECONDS")] = 0.0


@dataclass(frozen=True)
class EngineConfig:
    """The machine under the model."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Option("auto: CUDA where it is, else CPU", common=True)] = "auto"
    cpu_threads: Annotated[int, Option("CPU threads of each engine; 0: the usable cores, divided among them")] = 0
    batch_invariant: Annotated[
        bool, Option("CUDA: the same bits for a request in any batch; large products run without cuBLASLt, slower")
    ] = False
    enforce_eager: Annotated[bool, Option("CUDA: launch kernel by kernel, capture no graphs")] = False


@dataclass(frozen=True)
class ParallelConfig:
    """Several engines, each with the whole model, on one machine or on several."""

    data_parallel_size: Annotated[
        int, Option("engines that share the requests, each with the whole model", "N", short="-dp", common=True)
    ] = 1
    data_parallel_size_local: Annotated[
        int, Option("those of them on this machine; -1: all, with --headless or --data-parallel-rank one", "N")
    ] = -1
    data_parallel_start_rank: Annotated[int, Option("rank of this machine's first engine", "N")] = 0
    data_parallel_rank: Annotated[
        int, Option("this server is the engine of that rank alone, and something else balances; -1: no", "N")
    ] = -1
    data_parallel_address: Annotated[str, Option("where the head listens for headless engines")] = "127.0.0.1"
    data_parallel_rpc_port: Annotated[int, Option("port of the head for headless engines")] = 29550
    data_parallel_key_file: Annotated[
        str, Option("key that head and headless engines share; hybrid-serve keys makes one", "FILE")
    ] = ""
    data_parallel_hybrid_lb: Annotated[bool, Option("API servers use the engines of their own machine only")] = False
    data_parallel_external_lb: Annotated[bool, Option("each engine is a server of its own; needs the rank")] = False
    data_parallel_backend: Annotated[
        Literal["mp", "ray"], Option("ray: engines run on nodes of a Ray cluster; needs the extra")
    ] = "mp"
    distributed_executor_backend: Annotated[
        str, Option("what computes: uni, in the engine; mp, its worker process; your class; ray", "uni|mp|ray|CLASS")
    ] = "uni"
    insecure_ray: Annotated[bool, Option("allow a Ray cluster without token authentication")] = False
    data_parallel_prefix_affinity: Annotated[
        bool, Option("give prompts with the same beginning to the same engine, unless it has much more to do")
    ] = False
    headless: Annotated[bool, Option("engines without API servers, which join a head on another machine")] = False

    @property
    def is_ray(self) -> bool:
        return "ray" in (self.data_parallel_backend, self.distributed_executor_backend)

    @property
    def local_ranks(self) -> range:
        """Of the engines that this machine's supervisor starts."""
        if self.is_ray:
            return range(0)
        if self.data_parallel_rank >= 0:
            return range(self.data_parallel_rank, self.data_parallel_rank + 1)
        rest = 1 if self.headless else self.data_parallel_size
        count = self.data_parallel_size_local if self.data_parallel_size_local >= 0 else rest
        return range(self.data_parallel_start_rank, self.data_parallel_start_rank + count)

    @property
    def remote_ranks(self) -> tuple[int, ...]:
        """Of the engines that join this head over the network."""
        if self.headless or self.data_parallel_hybrid_lb or self.data_parallel_rank >= 0:
            return ()
        return tuple(rank for rank in range(self.data_parallel_size) if rank not in self.local_ranks)


@dataclass(frozen=True)
class RoutingConfig:
    """Several models behind one address."""

    models: Annotated[
        str, Option("YAML file of several models, instead of MODEL; a request names one", "FILE", common=True)
    ] = ""
    max_loaded_models: Annotated[
        int, Option("of them in memory at once; the one unused for longest makes room for another; 0: any number")
    ] = 1
    max_loaded_bytes: Annotated[
        int, Option("that they may take together, by the memory that the file gives each; 0: any number", "SIZE")
    ] = 0


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP side."""

    host: Annotated[str, Option("address to bind", common=True)] = "127.0.0.1"
    port: Annotated[int, Option("port to bind; 0: any free one", common=True)] = 8000
    api_key: Annotated[
        tuple[str, ...], Option("key(s) clients must send as a bearer token", "KEY", common=True, secret=True)
    ] = ()
    admin_api_key: Annotated[
        tuple[str, ...], Option("key(s) that also open the admin routes, /admin/...", "KEY", secret=True)
    ] = ()
    api_key_file: Annotated[
        str, Option("YAML file of keys with names, scopes and limits, read again when it changes", "FILE")
    ] = ""
    prefix_cache_scope: Annotated[
        PrefixCacheScope, Option("who shares the KV of equal prompts; auto: each key alone, if there are several")
    ] = "auto"
    insecure_no_auth: Annotated[bool, Option("allow a host other than loopback without a key")] = False
    disable_docs: Annotated[bool, Option("no GET /docs, no /openapi.json", short="--disable-fastapi-docs")] = False
    api_server_count: Annotated[
        int, Option("API server processes that share the port", "N", short="-asc", common=True)
    ] = 1
    uds: Annotated[str, Option("listen on this unix socket instead of host and port", "PATH")] = ""
    ssl_certfile: Annotated[str, Option("certificate chain: serve HTTPS", "FILE")] = ""
    ssl_keyfile: Annotated[str, Option("key of the certificate; default: in the certificate's file", "FILE")] = ""
    ssl_ca_certs: Annotated[str, Option("who signs the certificates that clients show", "FILE")] = ""
    ssl_cert_reqs: Annotated[int, Option("client certificates: 0 none, 1 optional, 2 required")] = 0
    ssl_ciphers: Annotated[str, Option("OpenSSL's names of the ciphers to allow up to TLS 1.2")] = ""
    enable_ssl_refresh: Annotated[bool, Option("take the certificate up again when its files change")] = True
    allowed_origins: Annotated[
        tuple[str, ...], Option("web pages that may call the server (CORS); *: all of them", "ORIGIN")
    ] = ()
    allowed_methods: Annotated[tuple[str, ...], Option("methods that these pages may use", "METHOD")] = ("*",)
    allowed_headers: Annotated[tuple[str, ...], Option("headers that these pages may send", "HEADER")] = ("*",)
    allow_credentials: Annotated[bool, Option("these pages may send cookies")] = False
    middleware: Annotated[
        tuple[str, ...], Option("ASGI middleware classes around the routes, outermost first", "PACKAGE.MODULE.CLASS")
    ] = ()
    enable_request_id_headers: Annotated[bool, Option("name the request id in a response header")] = True
    root_path: Annotated[str, Option("path prefix that a proxy in front strips")] = ""
    max_request_bytes: Annotated[int, Option("largest request body, e.g. 16MiB", "SIZE")] = 16 * 2**20
    max_header_bytes: Annotated[
        int, Option("a request's line and headers, at most", "SIZE", short="--h11-max-incomplete-event-size")
    ] = 32 * 2**10
    max_headers: Annotated[int, Option("headers of a request, at most", short="--h11-max-header-count")] = 100
    keep_alive_timeout: Annotated[int, Option("seconds that a connection stays open between requests", "SECONDS")] = 15
    max_logprobs: Annotated[int, Option("largest top_logprobs a request may ask for")] = 20
    queue_while_loading: Annotated[
        bool, Option("requests wait while the model loads or the engine is restarted, up to max_num_queued_reqs")
    ] = False
    strict_requests: Annotated[bool, Option("unknown or unused request fields are a 400, not a header")] = False
    sse_keep_alive_interval: Annotated[float, Option("seconds between comments on a silent stream; 0: none")] = 15.0
    shutdown_timeout: Annotated[float, Option("seconds that running requests get to finish after SIGTERM")] = 30.0
    log_level: Annotated[LogLevel, Option("least level that is logged")] = "info"
    log_format: Annotated[LogFormat, Option("json: one object a line")] = "text"
    access_log: Annotated[AccessLog, Option("one line a request; errors: those answered with 4xx or 5xx")] = "off"
    disable_access_log_for_endpoints: Annotated[
        tuple[str, ...], Option("routes whose successes are not in the access log", "PATH")
    ] = ("/live", "/ready", "/health", "/ping", "/metrics")
    log_requests: Annotated[
        LogRequests, Option("log each generation; meta: numbers only, prompt: and its prompt, full: and its text")
    ] = "off"
    log_redactor: Annotated[
        str, Option("your function of a text; what it gives is logged instead", "PACKAGE.MODULE.FUNCTION")
    ] = ""
    otlp_traces_endpoint: Annotated[
        str, Option("collector of OpenTelemetry traces, http://HOST:4318/v1/traces; needs the extra otel", "URL")
    ] = ""
    max_log_len: Annotated[int, Option("most characters of a prompt or a text in the log")] = 1000
    metrics_prefix: Annotated[str, Option("prefix of the metrics that vLLM dashboards query")] = "vllm:"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not appear in a log."""
        return self.api_key + self.admin_api_key

    @property
    def asks_for_keys(self) -> bool:
        return bool(self.secrets or self.api_key_file)


@dataclass(frozen=True)
class SupervisionConfig:
    """What is done about processes that die or hang."""

    max_restarts: Annotated[int, Option("restarts of each process within 5 minutes, then the server ends")] = 3
    restart_delay: Annotated[float, Option("seconds before the second restart; doubles with each further one")] = 1.0
    engine_heartbeat_timeout: Annotated[float, Option("seconds without a sign of life until it is restarted")] = 10.0
    engine_iteration_timeout: Annotated[
        float, Option("seconds a step may take before the engine is restarted, and 0.1 s more a token")
    ] = 60.0
    flight_recorder_dir: Annotated[str, Option("where dead engines leave their last steps; default: /tmp", "DIR")] = ""


@dataclass(frozen=True)
class Config:
    """All of it; what a process is started with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(data: bytes) -> Config:
        return msgspec.json.decode(data, type=Config)

    def digest(self) -> str:
        """Equal in two processes exactly if they were started with the same configuration."""
        return hashlib.sha256(self.to_json()).hexdigest()[:16]

    def engine_digest(self) -> str:
        """Equal on two machines exactly if their engines were."""
        groups = (self.model, self.cache, self.scheduler, self.engine)
        return hashlib.sha256(msgspec.json.encode(groups)).hexdigest()[:16]


MAX_NUM_SEQS = 256  # where nothing is said and memory allows it
