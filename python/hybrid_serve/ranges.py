"""Of every option that is a number: least and largest value.

JSON, YAML and flags bring the type, this brings the sense.
"""

from __future__ import annotations

_INT32_MAX = 2**31 - 1  # counts and lengths are int32 in the core
RANGES: dict[str, tuple[float, float]] = {
    "max_model_len": (0, _INT32_MAX),
    "seed": (-1, 2**63 - 1),
    "num_gpu_blocks_override": (0, _INT32_MAX),
    "kv_cache_memory_bytes": (0, 2**63 - 1),
    "gpu_memory_utilization": (0.05, 1),
    "swap_space": (0, 2**20),
    "max_num_seqs": (0, _INT32_MAX),
    "max_num_batched_tokens": (0, _INT32_MAX),
    "max_num_queued_reqs": (0, _INT32_MAX),
    "max_queue_time_s": (0, 86400),
    "ttft_slo_ms": (0, 86400e3),
    "deadline_s": (0, 86400),
    "cpu_threads": (0, 4096),
    "data_parallel_size": (1, 128),
    "data_parallel_size_local": (-1, 128),
    "data_parallel_start_rank": (0, 127),
    "data_parallel_rank": (-1, 127),
    "data_parallel_rpc_port": (1, 65535),
    "max_loaded_models": (0, _INT32_MAX),
    "max_loaded_bytes": (0, 2**63 - 1),
    "port": (0, 65535),
    "api_server_count": (1, 4096),
    "ssl_cert_reqs": (0, 2),
    "max_log_len": (0, _INT32_MAX),
    "max_request_bytes": (1024, 2**40),
    "max_header_bytes": (1024, 2**30),
    "max_headers": (1, _INT32_MAX),
    "keep_alive_timeout": (1, 86400),
    "max_logprobs": (0, _INT32_MAX),
    "sse_keep_alive_interval": (0, 86400),
    "shutdown_timeout": (0, 86400),
    "max_restarts": (0, _INT32_MAX),
    "restart_delay": (0, 86400),
    "engine_heartbeat_timeout": (1, 86400),
    "engine_iteration_timeout": (1, 86400),
}
