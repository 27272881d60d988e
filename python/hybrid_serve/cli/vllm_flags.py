"""Flags and variables of ``vllm serve`` that are not ours under the same name: refused by name, and translated."""

from __future__ import annotations

# Flags that we know and do not have. One that config.py gains leaves this table (a test sees to it).
_NAMES = """
    async-scheduling chat-template-content-format collect-detailed-traces compilation-config cpu-offload-gb
    cudagraph-capture-sizes custom-histogram-buckets data-parallel-multi-port-external-lb default-chat-template-kwargs
    disable-log-requests disable-log-stats disable-uvicorn-access-log
    enable-auto-tool-choice enable-chunked-prefill enable-fault-tolerance enable-force-include-usage
    enable-log-deltas enable-log-outputs enable-log-requests
    enable-lora enable-mfu-metrics enable-offline-docs enable-per-request-metrics enable-prompt-tokens-details
    enable-server-load-tracking enable-sleep-mode enable-tokenizer-info-endpoint generation-config grpc grpc-port
    hf-overrides hf-token kv-cache-memory
    kv-cache-metrics kv-events-config kv-offloading-size kv-transfer-config limit-mm-per-prompt log-config-file
    log-error-stack logging-config logprobs-mode long-prefill-token-threshold lora-modules master-addr master-port
    max-cpu-loras max-cudagraph-capture-size max-lora-rank max-loras max-num-queued-tokens nnodes node-rank
    override-generation-config pipeline-parallel-size pp prefix-caching-hash-algo profiler-config quantization
    reasoning-parser reasoning-parser-plugin response-role return-tokens-as-token-ids scheduling-policy
    show-hidden-metrics-for-version skip-tokenizer-init speculative-config stream-interval structured-outputs-config
    task tensor-parallel-size tokenizer-mode tokens-only tool-call-parser tool-parser-plugin tp
    trust-remote-code uvicorn-log-level watchdog-config watermark
"""
NOT_SUPPORTED = frozenset(_NAMES.split())

# What is ours instead, in words of a command line.
INSTEAD = {
    "enable-log-requests": ("--log-requests", "meta"),
    "enable-log-outputs": ("--log-requests", "full"),  # vLLM wants the other one with it: this one counts
}
# Why one needs no counterpart, or where it is.
NOTES = {
    "async-scheduling": "not needed: the loop overlaps where the device gains by it",
    "chat-template-content-format": "not needed: found out from the template",
    "collect-detailed-traces": "not needed: spans have what each step did",
    "data-parallel-multi-port-external-lb": "a server for each rank: --data-parallel-rank",
    "disable-log-requests": "not needed: requests are not logged unless --log-requests says so",
    "disable-log-stats": "not needed: no statistics are logged",
    "disable-uvicorn-access-log": "not needed: no access log is written unless --access-log says so",
    "enable-chunked-prefill": "not needed: always on",
    "enable-fault-tolerance": "not needed: an engine that dies or hangs is started again, and requests go on",
    "enable-log-deltas": "not needed: --log-requests full has the whole text",
    "enable-offline-docs": "not needed: /docs loads nothing from elsewhere",
    "enable-per-request-metrics": "not needed: the header Server-Timing, GET /v1/requests/ID/timeline",
    "enable-prompt-tokens-details": "not needed: always in usage",
    "enable-server-load-tracking": "not needed: GET /load always has it",
    "kv-cache-memory": "there is --kv-cache-memory-bytes SIZE; hybrid-serve fit MODEL says which",
    "log-config-file": "there are --log-level and --log-format",
    "log-error-stack": "not needed: the log always has it",
    "logging-config": "there are --log-level and --log-format json",
    "trust-remote-code": "never: no code of a model folder is run",
    "uvicorn-log-level": "there is one --log-level for everything",
    "watchdog-config": "there are --engine-heartbeat-timeout and --engine-iteration-timeout",
}
# Variables of vLLM's -> our flag; of a key our variable, which the list of processes does not show.
VARIABLES = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "--keep-alive-timeout"}
SECRET_VARIABLES = {"VLLM_API_KEY": "HYBRID_SERVE_API_KEY"}


def why_not(name: str) -> str:
    """What to say of a flag, given without dashes and ``no-`` in front; empty: no more than that it is not here."""
    name = name.partition(".")[0]
    return f"there is {' '.join(INSTEAD[name])}" if name in INSTEAD else NOTES.get(name, "")
