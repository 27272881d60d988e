#!/usr/bin/env python3
"""Writes docs/reference/*.md from the tables that the program itself runs by; a test fails while a page is stale.

python docs/generate.py
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from prometheus_client.parser import text_string_to_metric_families

from hybrid_serve.catalogue import FAULTS
from hybrid_serve.cli.bench.command import KINDS
from hybrid_serve.cli.main import COMMANDS
from hybrid_serve.cli.settings import settings
from hybrid_serve.client.engine_client import ZmqEngineClient
from hybrid_serve.config import Config
from hybrid_serve.server.app import create_app
from hybrid_serve.server.context import ServerContext

REFERENCE = Path(__file__).parent / "reference"
METRICS_ARE = """`GET /metrics` is Prometheus text. Names that begin with `vllm:` are those that vLLM's dashboards
query, with the same meaning and the same buckets; `--metrics-prefix` gives them another beginning. On the wire a
histogram's name gets `_bucket`, `_sum` and `_count`, a summary's the last two. Everything is of all API servers
together, except `process_...` and `python_...`: memory, file descriptors, CPU seconds and the garbage collector of the
one that answers. A handler is a route's path, or `none` for what is no route; as of vLLM's server, requests of probes
and scrapers (`/live`, `/ready`, `/health`, `/ping`, `/load`, `/metrics`, `/version`) are not in `http_...`.

`deploy/grafana-dashboard.json` and `deploy/prometheus-alerts.yaml` query nothing that is not here. With API keys,
scraping needs one: `authorization: {credentials: KEY}` in Prometheus' scrape configuration, where KEY may have the
scope `metrics` alone.

`promtool check metrics` has two kinds of findings, both about vLLM's names, which stay as dashboards query them: the
colon of `vllm:`, and that the histogram `vllm:iteration_tokens_total` is called as a counter is. With
`--metrics-prefix llm_` it has none (the histogram is then `llm_iteration_tokens`)."""
NOT_HERE_ARE = """## What vLLM's dashboards query and is not here

Of the dashboards that vLLM publishes (its repository's examples, the newest and those of earlier versions), every other
name is above. vLLM, too, has these only where the feature is in use; their panels stay empty here. `*`: all names that
begin so."""
NOT_HERE = {
    "vllm:lora_requests_info": "adapters are not built",
    "vllm:spec_decode_*": "speculative decoding is not built",
    "vllm:sleep_mode_operation_*": "an engine does not sleep; `engine_sleep_state` says awake",
    "vllm:rl_weight_update_operation_*": "weights are not changed while a server runs",
    "vllm:estimated_*": "behind a flag of vLLM's: no estimate of operations and bytes is made",
    "vllm:kv_block_*": "behind a flag of vLLM's: the ages of KV blocks are not recorded",
    "vllm:num_requests_kv_fetch_by_stage": "KV does not come from other servers",
    "vllm:nixl_*": "KV does not come from other servers",
    "vllm:kv_offload_*": "an evicted prefix is not kept; for preempted requests see `hybrid_swapped_blocks_total`",
    "vllm:simple_kv_offload_*": "the same",
    "vllm:prefix_cache_hits": "a counter without `_total`, as which vLLM has none either: a panel of the dashboard "
    "for Kubernetes is empty with both until its query gets `_total`",
    "vllm:prefix_cache_queries": "the same",
    "vllm:request_success": "queried as the other spelling (`or`) of the name with `_total`, which is above",
    "vllm:prompt_tokens": "the same",
    "vllm:generation_tokens": "the same",
    "vllm:num_preemptions": "the same",
}
NOTICE = "<!-- Made by docs/generate.py: edit the source that it reads, then run it again. -->\n"


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    made = {
        "commands.md": commands(),
        "errors.md": errors(),
        "metrics.md": metrics(),
        "options.md": options(),
        "routes.md": routes(),
    }
    return {name: f"{NOTICE}\n{text.rstrip()}\n" for name, text in made.items()}


def errors() -> str:
    """One section an error, so that a link can point at its number."""
    parts = [
        "# Errors",
        "A failed start ends with a box that has one of these numbers; an HTTP error has it as `hs_code`.",
    ]
    for title, wanted in (("Starts", False), ("HTTP answers", True)):
        parts.append(f"## {title}")
        for fault in FAULTS.values():
            if bool(fault.status) is wanted:
                kind = f"HTTP {fault.status}, `error.code` `{fault.name}`" if wanted else f"exit code {fault.exit_code}"
                parts.append(f"### {fault.code}\n\n**{fault.title}** ({kind}). {fault.cause}\n\nFix: {fault.fix}")
    return "\n\n".join(parts)


def commands() -> str:
    rows = [(f"`hybrid-serve {name}`", command.summary) for name, command in COMMANDS.items()]
    rows += [(f"`hybrid-serve bench {name}`", summary) for name, (_, summary) in KINDS.items()]
    return "# Commands\n\n`hybrid-serve COMMAND --help` has each one's flags.\n\n" + table(
        ("command", "what it does"), rows
    )


def options() -> str:
    """Every option as flag, variable and key."""
    parts = [
        "# Options",
        "Of `serve`, and of the other commands that start an engine. A flag beats a variable, a variable the YAML file "
        "(`--config`). The key of the file is the flag's name with `_` for `-`; "
        "`hybrid-serve config explain` shows what is in force and why.",
    ]
    for group, group_type in get_type_hints(Config).items():
        rows = []
        for setting in (setting for setting in settings() if setting.group == group):
            default = setting.shown(setting.default)
            values = ", ".join(setting.choices) or ("true, false" if setting.type is bool else setting.metavar)
            flag = f"`{setting.flag}`" + (f", `{setting.option.short}`" if setting.option.short else "")
            rows.append((flag, f"`{setting.variable}`", values, default or "none", setting.option.help))
        parts.append(f"## {group}: {(group_type.__doc__ or '').splitlines()[0]}")
        parts.append(table(("flag", "variable", "values", "default", "meaning"), rows))
    return "\n\n".join(parts)


def routes() -> str:
    """From the description that the server itself serves."""
    rows = []
    for path, methods in json.loads(asked("/openapi.json"))["paths"].items():
        for method, operation in methods.items():
            streams = "text/event-stream" in operation["responses"]["200"].get("content", {})
            needs_key = operation.get("security") != []
            summary = operation["summary"].rstrip(".")
            rows.append(
                (f"`{method.upper()} {path}`", summary, "yes" if streams else "no", "yes" if needs_key else "no")
            )
    head = ("route", "what it is", "can stream", "needs a key, where keys are set")
    return "# Routes\n\nBodies are described by the server: `GET /openapi.json`.\n\n" + table(head, rows)


def metrics() -> str:
    """From the exposition of a server that has counted one of each, so that labels show."""
    families = sorted(text_string_to_metric_families(asked("/metrics").decode()), key=lambda family: family.name)
    families = [family for family in families if not family.name.startswith(("process_", "python_"))]
    rows = []
    for family in families:
        suffix = {"counter": "_total"}.get(family.type, "")
        labels = sorted({label for sample in family.samples for label in sample.labels if label != "le"})
        if family.name.endswith("cache_config_info"):
            labels = ["engine", "num_gpu_blocks", "the options of the cache"]
        rows.append((f"`{family.name}{suffix}`", family.type, ", ".join(labels), family.documentation))
    absent = table(("name", "why"), [(f"`{name}`", why) for name, why in NOT_HERE.items()])
    here = table(("name", "type", "labels", "meaning"), rows)
    return f"# Metrics\n\n{METRICS_ARE}\n\n{here}\n\n{NOT_HERE_ARE}\n\n{absent}"


def asked(path: str) -> bytes:
    """What the application answers to a GET, without a socket and without an engine."""
    config, pieces = Config(), []
    context = ServerContext(config, ZmqEngineClient(config, 0, "inproc://nowhere", [(0, "inproc://nowhere")]))
    context.metrics.http.ended("/v1/models", "GET", 200, 0.0, 0, 0)
    context.metrics.startup_seconds["loading_weights", "0"] = 0.0
    context.metrics.num_reloads["key file", "ok"] = 0
    context.metrics.key_used("name", "requests", 0)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status", 200) == 200, message
        pieces.append(message.get("body", b""))

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(b"host", b"localhost")], "http_version": "1.1", "scheme": "http", "client": None}
    asyncio.run(create_app(context)(scope, receive, send))
    context.close()
    return b"".join(pieces)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)


if __name__ == "__main__":
    main()
