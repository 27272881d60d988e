"""/metrics: names, numbers and form; and the dashboard, the alerts and the page that speak of them (FEATURES 4.1)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from api_harness import CHAT, MESSAGES, Api, says
from fake_engine import FakeEngine
from hybrid_serve.client import EngineRejected
from hybrid_serve.wire import STEP_TOKEN_BOUNDS, EngineStats, Status

MakeApi = Callable[..., Api]
ROOT = Path(__file__).parents[3]
STATS = EngineStats(
    2, 3, 25, 100, 7, 40, 30, 9, 99, (1, 2, *[0] * 10, 3, 2, 0, 1), 800, (1, 2, 3, *[0] * 9, 2),
    waiting_seconds=1.5, empty_slots=40, step_age=0.25, phase_us=(10, 200, 30, 4000, 50, 6),
)  # fmt: skip

# What vLLM 0.33 exports without special features, and the older names that dashboards still query.
_NAMES = """
    num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc prefix_cache_queries
    prefix_cache_hits num_preemptions prompt_tokens prompt_tokens_by_source prompt_tokens_cached
    prompt_tokens_cached_by_source generation_tokens request_success admission_rejections request_prompt_tokens
    request_generation_tokens request_max_num_generation_tokens request_params_max_tokens
    request_prefill_kv_computed_tokens request_params_n request_num_preemptions iteration_tokens_total
    time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds
    e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds
    request_decode_time_seconds cache_config_info
    time_per_output_token_seconds gpu_cache_usage_perc cpu_cache_usage_perc num_requests_swapped
    gpu_prefix_cache_queries gpu_prefix_cache_hits
"""
VLLM = _NAMES.split()
# What the dashboards that vLLM publishes query: of its repository "overview", "instances", "KV cache", "speculative
# decoding", "service status", the two of statistics for Grafana and for Perses, the one for a fleet on Kubernetes (also
# the last line's), and the ones of before under the same names; and those of its production stack, without the names of
# the stack's own router. A panel without its series is empty, or says that the server is down.
_QUERIED = """
    request_success_total prompt_tokens_total generation_tokens_total time_to_first_token_seconds_bucket
    time_to_first_token_seconds_sum time_to_first_token_seconds_count inter_token_latency_seconds_bucket
    inter_token_latency_seconds_sum inter_token_latency_seconds_count e2e_request_latency_seconds_bucket
    e2e_request_latency_seconds_sum e2e_request_latency_seconds_count num_requests_running num_requests_waiting
    num_requests_waiting_by_reason kv_cache_usage_perc num_preemptions_total prefix_cache_hits_total
    prefix_cache_queries_total external_prefix_cache_hits_total external_prefix_cache_queries_total
    mm_cache_hits_total mm_cache_queries_total request_time_per_output_token_seconds_bucket
    request_time_per_output_token_seconds_sum request_time_per_output_token_seconds_count
    request_queue_time_seconds_bucket request_queue_time_seconds_sum request_queue_time_seconds_count
    request_prefill_time_seconds_bucket request_prefill_time_seconds_sum request_prefill_time_seconds_count
    request_decode_time_seconds_bucket request_decode_time_seconds_sum request_decode_time_seconds_count
    iteration_tokens_total_bucket iteration_tokens_total_sum iteration_tokens_total_count
    prompt_tokens_by_source_total prompt_tokens_cached_total prompt_tokens_cached_by_source_total
    request_prompt_tokens_bucket request_prompt_tokens_sum request_prompt_tokens_count
    request_generation_tokens_bucket request_generation_tokens_sum request_generation_tokens_count
    request_prefill_kv_computed_tokens_sum request_prefill_kv_computed_tokens_count engine_sleep_state
    cache_config_info time_per_output_token_seconds_bucket time_per_output_token_seconds_sum
    time_per_output_token_seconds_count gpu_cache_usage_perc cpu_cache_usage_perc num_requests_swapped
    request_max_num_generation_tokens_bucket request_max_num_generation_tokens_sum
    request_params_max_tokens_bucket
    lora_requests_info sleep_mode_operation_duration_seconds_bucket sleep_mode_operation_duration_seconds_sum
    sleep_mode_operation_duration_seconds_count rl_weight_update_operation_duration_seconds_bucket
    rl_weight_update_operation_duration_seconds_sum rl_weight_update_operation_duration_seconds_count
    estimated_flops_per_gpu_total estimated_read_bytes_per_gpu_total estimated_write_bytes_per_gpu_total
    kv_block_lifetime_seconds_bucket kv_block_lifetime_seconds_sum kv_block_lifetime_seconds_count
    kv_block_idle_before_evict_seconds_bucket kv_block_reuse_gap_seconds_bucket num_requests_kv_fetch_by_stage
    nixl_xfer_time_seconds_bucket nixl_xfer_time_seconds_sum nixl_xfer_time_seconds_count nixl_bytes_transferred_sum
    nixl_post_time_seconds_bucket nixl_num_descriptors_bucket nixl_num_failed_transfers_total
    nixl_num_failed_notifications_total nixl_num_kv_expired_reqs_total nixl_num_notifications_after_expiry_total
    kv_offload_load_bytes_total kv_offload_store_bytes_total kv_offload_load_time_total kv_offload_store_time_total
    kv_offload_load_size_sum kv_offload_store_size_sum kv_offload_lookup_sync_delay_seconds_bucket
    kv_offload_lookup_async_delay_seconds_bucket kv_offload_cpu_cache_usage_perc
    kv_offload_cpu_cache_write_usage_perc kv_offload_cpu_cache_read_usage_perc kv_offload_allocation_failure_total
    kv_offload_stores_skipped_total simple_kv_offload_save_outcomes_total simple_kv_offload_load_blocks_total
    simple_kv_offload_used_blocks simple_kv_offload_pending_store_blocks spec_decode_num_drafts_total
    spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
    spec_decode_num_accepted_tokens_per_pos_total
    gpu_prefix_cache_hits_total gpu_prefix_cache_queries_total
    prefix_cache_hits prefix_cache_queries request_success prompt_tokens generation_tokens num_preemptions
"""
QUERIED = {f"vllm:{name}" for name in _QUERIED.split()} | {
    "http_requests_total", "http_request_duration_seconds_sum", "http_request_duration_seconds_count",
    "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "process_max_fds",
    "process_start_time_seconds",
}  # fmt: skip
METRICS_PAGE = (ROOT / "docs" / "reference" / "metrics.md").read_text()


def families(text: str) -> dict[str, Any]:
    """By name; counters without ``_total``. Fails for what a strict reader would refuse."""
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        assert family.name not in found, f"{family.name} comes twice"
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram", "summary"), family.name
        found[family.name] = family
        series = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(set(series)) == len(series), family.name
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \S+ .+|[a-zA-Z_:][\w:]*(\{.*\})? \S+", line), line
    return found


def value(found: dict[str, Any], name: str, suffix: str = "", **labels: str) -> float:
    samples = [
        sample.value
        for sample in found[name].samples
        if sample.name == name + suffix and labels.items() <= sample.labels.items()
    ]
    assert len(samples) == 1, (name, labels, samples)
    return float(samples[0])


@pytest.fixture
def used(make_api: MakeApi) -> tuple[Api, list[dict[str, int]]]:
    """A server that has answered a few requests, and their usage."""
    engine = FakeEngine(says("one two three"), cached_tokens=4, num_preemptions=2, prefill_seconds=1e-9, stats=STATS)
    api = make_api(engine, api_key=("k",))
    headers = {"x_api_key": "k"}
    usage = []
    for fields in ({}, {"n": 2, "max_tokens": 1}):
        response = api.post(CHAT, {"messages": MESSAGES, **fields}, **headers)
        assert response.status_code == 200
        usage.append(response.json()["usage"])
    engine.reject = EngineRejected(503, "full", "overloaded")
    assert api.post(CHAT, {"messages": MESSAGES}, **headers).status_code == 503
    assert api.post(CHAT, {}, **headers).status_code == 400
    assert api.get("/no/such/route", x_api_key="k").status_code == 404
    return api, usage


def scrape(api: Api) -> dict[str, Any]:
    response = api.get("/metrics", x_api_key="k")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return families(response.text)


def test_it_parses_strictly_and_has_every_name_of_vllm(used: tuple[Api, Any]) -> None:
    found = scrape(used[0])
    assert [
        name for name in VLLM if "vllm:" + name not in found and "vllm:" + name.removesuffix("_total") not in found
    ] == []


def test_a_dashboard_that_was_made_for_vllm_finds_every_series_with_the_labels_it_picks_by(
    used: tuple[Api, Any],
) -> None:
    """S40"""
    found = scrape(used[0])
    samples = {sample.name: sample.labels for family in found.values() for sample in family.samples}
    absent = re.findall(r"^\| `(vllm:[^`]+)` \| [^|]+ \|$", METRICS_PAGE, re.MULTILINE)  # with the reason
    named = {one: {name for name in QUERIED if fnmatch(name, one)} for one in absent}
    assert all(named.values()), "each of them is queried somewhere"
    assert QUERIED - set(samples) == set().union(*named.values())
    here = QUERIED & set(samples)
    assert all("model_name" in samples[name] for name in here if name.startswith("vllm:") and "config" not in name)
    assert value(found, "vllm:engine_sleep_state", sleep_state="awake") == 1
    assert {"status", "handler"} <= set(samples["http_requests_total"])
    for histogram, bounds in (
        ("time_to_first_token_seconds", ("0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "10.0")),
        ("request_time_per_output_token_seconds", ("0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5")),
    ):
        known = {sample.labels.get("le") for sample in found[f"vllm:{histogram}"].samples}
        assert set(bounds) <= known


def promtool() -> str:
    """Its path. Where it is missing, tests that need it skip; where HYBRID_REQUIRE_TOOLS=1 (CI), they fail."""
    path = shutil.which("promtool")
    if path is None:
        missing = "promtool is not installed: apt-get install prometheus"
        if os.environ.get("HYBRID_REQUIRE_TOOLS") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return path


def complaints(text: bytes) -> tuple[int, set[str]]:
    """Of ``promtool check metrics``: its exit code, its lines."""
    done = subprocess.run([promtool(), "check", "metrics"], input=text, capture_output=True)
    return done.returncode, set((done.stdout + done.stderr).decode().splitlines())


def test_promtool_has_nothing_to_say_but_of_names_that_are_as_dashboards_want_them(used: tuple[Api, Any]) -> None:
    """S40. vLLM's names have a colon, and one of its histograms is called as counters are; there is no other finding,
    and none about a name of our own."""
    names = {
        family.name + "_total" * (family.type == "counter") for family in scrape(used[0]).values() if family.samples
    }
    expected = {f"{name} metric names should not contain ':'" for name in names if name.startswith("vllm:")}
    odd = 'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix'
    assert complaints(used[0].get("/metrics", x_api_key="k").content) == (3, expected | {odd})
    assert len([name for name in names if name.startswith("hybrid_")]) >= 10


def test_promtool_has_nothing_at_all_to_say_where_names_need_not_be_those_of_vllm(make_api: MakeApi) -> None:
    """S40"""
    api = make_api(FakeEngine(says("one two"), stats=STATS), metrics_prefix="llm_")
    assert api.post(CHAT, {"messages": MESSAGES}).status_code == 200
    text = api.get("/metrics").content
    assert b"llm_iteration_tokens_bucket" in text
    assert complaints(text) == (0, set())


def test_promtool_takes_the_alert_rules() -> None:
    rules = ROOT / "deploy" / "prometheus-alerts.yaml"
    done = subprocess.run([promtool(), "check", "rules", str(rules)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_requests_and_tokens_add_up(used: tuple[Api, list[dict[str, int]]]) -> None:
    api, usage = used
    found = scrape(api)
    prompt = sum(each["prompt_tokens"] for each in usage)
    rejected = usage[0]["prompt_tokens"]  # it was refused after its prompt had been counted
    assert value(found, "vllm:prompt_tokens", "_total") == prompt + rejected
    assert value(found, "vllm:generation_tokens", "_total") == sum(each["completion_tokens"] for each in usage)
    assert value(found, "vllm:prompt_tokens_cached", "_total") == 8
    assert value(found, "vllm:prompt_tokens_by_source", "_total", source="local_compute") == prompt + rejected - 8
    for reason, count in (("stop", 1), ("length", 2), ("error", 1), ("abort", 0)):
        assert value(found, "vllm:request_success", "_total", finished_reason=reason) == count
    assert value(found, "vllm:admission_rejections", "_total", reason="max_num_queued_reqs") == 1
    assert value(found, "vllm:time_to_first_token_seconds", "_count") == 3
    assert value(found, "vllm:inter_token_latency_seconds", "_count") == usage[0]["completion_tokens"] - 1
    assert value(found, "vllm:time_per_output_token_seconds", "_count") == usage[0]["completion_tokens"] - 1
    assert value(found, "vllm:e2e_request_latency_seconds", "_count") == 4
    for phase in ("queue", "prefill", "decode", "inference"):
        assert value(found, f"vllm:request_{phase}_time_seconds", "_count") == 3
    assert value(found, "vllm:request_num_preemptions", "_sum") == 6
    assert value(found, "vllm:request_max_num_generation_tokens", "_count") == 3
    assert value(found, "hybrid_key_usage", "_total", key="api-key-1", kind="requests") == 4


def test_the_engines_own_numbers_come_from_its_last_word(used: tuple[Api, Any]) -> None:
    found = scrape(used[0])
    expected = {
        "num_requests_running": 2, "num_requests_waiting": 3, "kv_cache_usage_perc": 0.25, "gpu_cache_usage_perc": 0.25,
    }  # fmt: skip
    for name, number in expected.items():
        assert value(found, "vllm:" + name) == number
    for name, number in {"num_preemptions": 7, "prefix_cache_queries": 40, "prefix_cache_hits": 30}.items():
        assert value(found, "vllm:" + name, "_total") == number
    name = "vllm:iteration_tokens_total"
    assert value(found, name, "_bucket", le="2.0") == 3
    assert value(found, name, "_bucket", le=f"{STEP_TOKEN_BOUNDS[-1]:.1f}") == 8
    assert (value(found, name, "_count"), value(found, name, "_sum")) == (9, 99)
    name = "hybrid_step_gap_seconds"
    assert value(found, name, "_bucket", le="2e-05") == 6
    assert (value(found, name, "_count"), value(found, name, "_sum")) == (8, 0.0008)
    info = found["vllm:cache_config_info"].samples[0].labels
    assert (info["block_size"], info["num_gpu_blocks"], info["enable_prefix_caching"]) == ("16", "100", "True")


def test_the_load_is_that_of_all_engines(make_api: MakeApi) -> None:
    """4.2; two engines that say the same, and a request that is open."""
    engine = FakeEngine(says("one two"), stats=STATS, ranks=(0, 1), wait_seconds=1.25)
    api = make_api(engine)
    expected = {"running": 4, "waiting": 6, "kv_cache_usage": 0.25, "estimated_wait_s": 1.25}
    assert api.get("/load").json() == {"server_load": 0, **expected}
    gate = engine.gates[0] = asyncio.Event()

    async def while_one_is_open() -> Any:
        asked = asyncio.ensure_future(api.client.post(CHAT, json={"messages": MESSAGES}))
        while not engine.calls:
            await asyncio.sleep(0)
        loaded = (await api.client.get("/load")).json()
        gate.set()
        assert (await asked).status_code == 200
        return loaded

    assert api.run(while_one_is_open()) == {"server_load": 1, **expected}


def test_what_an_engine_said_gets_older_while_it_says_nothing_more(make_api: MakeApi) -> None:
    engine = FakeEngine(says("one"), stats=STATS, stats_age=10.0)
    found = scrape(make_api(engine))
    assert value(found, "hybrid_last_step_age_seconds") == 10.25
    assert value(found, "hybrid_queue_oldest_seconds") == 11.5
    assert value(found, "hybrid_kv_waste_ratio") == 40 / (25 * 16)
    for phase, seconds in (("schedule", 0.0002), ("wait", 0.004), ("send", 0.000006)):
        assert value(found, "hybrid_step_seconds", "_sum", phase=phase) == seconds
        assert value(found, "hybrid_step_seconds", "_count", phase=phase) == 9
    engine.stats = EngineStats()
    found = scrape(make_api(engine))
    assert value(found, "hybrid_queue_oldest_seconds") == 0, "nobody waits"
    assert value(found, "hybrid_kv_waste_ratio") == 0
    assert value(found, "hybrid_last_step_age_seconds") == 10


def test_http_requests_are_counted_by_route_and_never_by_a_clients_text(used: tuple[Api, Any]) -> None:
    api, _ = used
    for i in range(20):
        api.get(f"/wp-admin/{i}")
        api.get(f"/v1/models/{i}", x_api_key="k")
        api.run(api.client.request(f"METHOD{i}", "/live"))
    found = scrape(api)
    name = "http_requests"
    assert value(found, name, "_total", handler=CHAT, method="POST", status="2xx") == 2
    assert value(found, name, "_total", handler=CHAT, method="POST", status="4xx") == 1
    assert value(found, name, "_total", handler=CHAT, method="POST", status="5xx") == 1
    assert value(found, name, "_total", handler="none", method="GET", status="4xx") == 21
    assert value(found, name, "_total", handler="/v1/models/{id:path}", method="GET", status="4xx") == 20
    assert {sample.labels["method"] for sample in found[name].samples} == {"GET", "POST", "other"}
    assert value(found, "http_request_duration_seconds", "_count", handler=CHAT, method="POST") == 4
    assert value(found, "http_response_size_bytes", "_sum", handler=CHAT) > 200
    assert value(found, "http_request_duration_highr_seconds", "_count") == 4 + 21 + 20 + 20


def test_probes_and_scrapes_are_no_requests_of_clients(make_api: MakeApi) -> None:
    """S40: an alert on failed requests must not fire because a server that loads its model says so when asked."""
    api = make_api(FakeEngine(says("one"), status=Status("loading_weights"), facts=None))
    for path in ("/live", "/ready", "/health", "/ping", "/load", "/metrics", "/version"):
        api.get(path)
    api.get("/v1/models")
    http = {
        sample.labels["handler"]
        for family in scrape(api).values()
        for sample in family.samples
        if "handler" in sample.labels
    }
    assert http == {"/v1/models"}


def test_the_prefix_is_a_choice(make_api: MakeApi) -> None:
    text = make_api(metrics_prefix="mine:").get("/metrics").text
    assert "mine:prompt_tokens_total" in text
    assert "vllm:" not in text


def test_no_key_and_no_text_of_a_request_is_in_it(make_api: MakeApi) -> None:
    """ADV-57"""
    api = make_api(api_key=("canary-key",), admin_api_key=("canary-admin",))
    body = {"messages": [{"role": "user", "content": "canary-prompt"}]}
    api.post(CHAT, body, x_api_key="canary-key", x_request_id="canary-id")
    assert "canary" not in api.get("/metrics?canary=1", x_api_key="canary-admin").text


def test_the_page_lists_every_name_and_no_other(used: tuple[Api, Any]) -> None:
    documented = set(re.findall(r"^\| `([^`]+)` \|", METRICS_PAGE.partition("\n## ")[0], re.MULTILINE))
    found = {name: family for name, family in scrape(used[0]).items() if not name.startswith(("process_", "python_"))}
    exported = {name + "_total" * (family.type == "counter") for name, family in found.items()}
    assert documented == exported


def queried(expressions: Iterator[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\b(?:vllm:|(?:hybrid|http|process)_)\w+", text)}


def dashboard_expressions() -> Iterator[str]:
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


def alert_expressions() -> Iterator[str]:
    for group in yaml.safe_load((ROOT / "deploy" / "prometheus-alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert {"alert", "expr", "labels", "annotations"} <= set(rule)
            assert {"summary", "description"} <= set(rule["annotations"])
            yield rule["expr"]


@pytest.mark.parametrize("expressions", [dashboard_expressions, alert_expressions])
def test_everything_that_is_queried_is_exported(
    used: tuple[Api, Any], expressions: Callable[[], Iterator[str]]
) -> None:
    found = scrape(used[0])
    names = {sample.name for family in found.values() for sample in family.samples}
    wanted = queried(expressions())
    assert len(wanted) >= 8
    # What was not counted yet has no sample, but is announced all the same.
    assert {name for name in wanted if name not in names and name.removesuffix("_total") not in found} == set()
