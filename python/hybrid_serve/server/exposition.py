"""/metrics: the counts of all API servers and the engine's own, under the names that dashboards query.

docs/reference/metrics.md lists every name. Those with ``--metrics-prefix`` are vLLM's, ``http_``, ``process_`` and
``python_`` ones are as the usual libraries call them, ``hybrid_`` ones are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from .. import __version__
from ..client import EngineClient
from ..config import CacheConfig
from ..logging import Lines
from ..wire import STEP_GAP_BOUNDS, STEP_PHASES, STEP_TOKEN_BOUNDS, EngineStats, Status
from .metrics import REQUEST_HISTOGRAMS, Flat, Histogram, Metrics, RequestCounts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OURS = "hybrid_"
_MODEL = ("model_name",)
_ENGINE = ("model_name", "engine")
_Rows = Iterable[tuple[Sequence[str], float]]


class OfModel(NamedTuple):
    """One of the served models."""

    name: str
    client: EngineClient
    is_ready: Callable[[], bool]  # a request would be taken now
    cache: CacheConfig


class OfEngine(NamedTuple):
    """What there is to say of one engine."""

    labels: tuple[str, str]  # model, engine
    cache: CacheConfig
    status: Status
    stats: EngineStats
    stats_age: float  # seconds since it said so
    counts: RequestCounts


class Exposition(Collector):
    """Turns the numbers into text when somebody asks; counts nothing itself."""

    def __init__(
        self, metrics: Metrics, models: Sequence[OfModel], num_open: Callable[[], Counter[str]], prefix: str
    ) -> None:
        """``num_open``: requests of this moment, by model."""
        self._own, self.models, self._own_open, self._prefix = metrics, models, num_open, prefix
        self.others: Callable[[], list[Flat]] = list  # the counts of other API servers
        self._registry = CollectorRegistry()
        self._registry.register(self)
        for of_process in (ProcessCollector, PlatformCollector, GCCollector):
            of_process(registry=self._registry)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def num_open(self) -> int:
        """Requests that all API servers work on."""
        return sum(self._all().num_open.values())

    def collect(self) -> Iterator[Metric]:
        metrics = self._all()
        engines = [
            OfEngine(
                (model.name, str(each.index)),
                model.cache,
                each.status,
                each.stats,
                each.stats_age,
                metrics.of(each.index),
            )
            for model in self.models
            for each in model.client.engines
        ]
        yield from self._engine(engines)
        yield from self._absent(engines)
        yield from self._older_names(engines)
        yield from self._requests(engines, metrics)
        yield from self._http(metrics)
        yield from self._ours(engines, metrics)

    def _all(self) -> Metrics:
        """The counts of every API server together."""
        self._own.num_open = self._own_open()
        self._own.lines_dropped(Lines.num_dropped)
        metrics = Metrics()
        for flat in (self._own.flat(), *self.others()):
            metrics.add(flat)
        return metrics

    def _engine(self, engines: list[OfEngine]) -> Iterator[Metric]:
        def stats(name: str) -> _Rows:
            return [(each.labels, getattr(each.stats, name)) for each in engines]

        yield self._gauge("num_requests_running", "Requests in the running batch.", stats("num_running"))
        yield self._gauge("num_requests_waiting", "Requests that wait for a place.", stats("num_waiting"))
        reasons = [((*labels, "capacity"), number) for labels, number in stats("num_waiting")]
        reasons += [((*each.labels, "deferred"), 0) for each in engines]
        name, text = f"{self._prefix}num_requests_waiting_by_reason", "Requests that wait, by what they wait for."
        yield gauges(name, text, (*_ENGINE, "reason"), reasons)
        # A dashboard that shows which models are up takes one without this for down.
        name, text = (
            f"{self._prefix}engine_sleep_state",
            "1 for the engine's state; it sleeps while its model is put away.",
        )
        states = ("awake", "weights_offloaded", "discard_all")
        slept: _Rows = [
            ((*each.labels, state), state == sleep_state(each.status)) for each in engines for state in states
        ]
        yield gauges(name, text, (*_ENGINE, "sleep_state"), slept)
        usages = [(each.labels, usage(each.stats)) for each in engines]
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usages)
        yield self._counter("num_preemptions", "Requests that lost their blocks for a while.", stats("num_preemptions"))
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats("prefix_queries"))
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", stats("prefix_hits"))
        infos = [self._cache_info(each) for each in engines]
        text = "1; the labels are the configuration of the cache."
        rows = [(tuple(info.values()), 1) for info in infos]
        yield gauges(f"{self._prefix}cache_config_info", text, tuple(infos[0]), rows)
        tokens = [(each.labels, each.stats.step_token_counts, each.stats.step_tokens) for each in engines]
        # vLLM calls this histogram as counters are called; who chooses another prefix has no dashboard that wants that.
        name = f"{self._prefix}iteration_tokens" + "_total" * (self._prefix == "vllm:")
        yield step_histogram(name, "Tokens of a step.", STEP_TOKEN_BOUNDS, tokens)

    def _cache_info(self, engine: OfEngine) -> dict[str, str]:
        facts = engine.status.facts
        info = {name: str(value) for name, value in vars(engine.cache).items()} | {"engine": engine.labels[1]}
        info["num_gpu_blocks"] = str(facts.num_blocks) if facts is not None else "0"
        return info | {"num_cpu_blocks": str(engine.stats.host_blocks_total)}

    def _absent(self, engines: list[OfEngine]) -> Iterator[Metric]:
        """What dashboards query and is not here: caches outside the engine and of media."""
        for cache in ("external_prefix_cache", "mm_cache"):
            for what in ("queries", "hits"):
                none = [(each.labels, 0) for each in engines]
                yield self._counter(f"{cache}_{what}", "There is no such cache here.", none)

    def _older_names(self, engines: list[OfEngine]) -> Iterator[Metric]:
        """What dashboards of earlier years query."""
        usages = [(each.labels, usage(each.stats)) for each in engines]
        on_host = [(each.labels, host_usage(each.stats)) for each in engines]
        swapped = [(each.labels, each.stats.num_swapped) for each in engines]
        queries = [(each.labels, each.stats.prefix_queries) for each in engines]
        hits = [(each.labels, each.stats.prefix_hits) for each in engines]
        yield self._gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", usages)
        yield self._gauge("cpu_cache_usage_perc", "Share of the swap space in use, 0 to 1.", on_host)
        yield self._gauge("num_requests_swapped", "Requests that wait with their KV in swap space.", swapped)
        yield self._counter("gpu_prefix_cache_queries", "Older name of prefix_cache_queries.", queries)
        yield self._counter("gpu_prefix_cache_hits", "Older name of prefix_cache_hits.", hits)
        latencies = [(each.labels, each.counts.histograms["inter_token_latency_seconds"]) for each in engines]
        text = "Older name of inter_token_latency_seconds."
        yield histograms(f"{self._prefix}time_per_output_token_seconds", text, _ENGINE, latencies)

    def _requests(self, engines: list[OfEngine], metrics: Metrics) -> Iterator[Metric]:
        def of(name: str) -> _Rows:
            return [(each.labels, getattr(each.counts, name)) for each in engines]

        yield self._counter("prompt_tokens", "Prompt tokens of all requests.", of("prompt_tokens"))
        by_source = [
            ((*each.labels, "local_compute"), each.counts.prompt_tokens - each.counts.cached_tokens) for each in engines
        ]
        by_source += [((*each.labels, "local_cache_hit"), each.counts.cached_tokens) for each in engines]
        name, text = f"{self._prefix}prompt_tokens_by_source", "Prompt tokens by where their KV came from."
        yield counters(name, text, (*_ENGINE, "source"), by_source)
        yield self._counter("prompt_tokens_cached", "Prompt tokens that were in the cache.", of("cached_tokens"))
        name, text = f"{self._prefix}prompt_tokens_cached_by_source", "Prompt tokens in the cache, by which."
        cached = [((*labels, "device"), number) for labels, number in of("cached_tokens")]
        yield counters(name, text, (*_ENGINE, "source"), cached)
        yield self._counter("generation_tokens", "Tokens generated.", of("generation_tokens"))
        ends = [((*each.labels, why), count) for each in engines for why, count in each.counts.finished.items()]
        name, text = f"{self._prefix}request_success", "Choices by the way they ended."
        yield counters(name, text, (*_ENGINE, "finished_reason"), ends)
        name, text = f"{self._prefix}admission_rejections", "Requests refused because too many wait."
        yield counters(name, text, (*_MODEL, "reason"), self._refused(engines).items())
        for name, (_, text) in REQUEST_HISTOGRAMS.items():
            rows = [(each.labels, each.counts.histograms[name]) for each in engines]
            yield histograms(self._prefix + name, text, _ENGINE, rows)

    def _http(self, metrics: Metrics) -> Iterator[Metric]:
        http = metrics.http
        text = "Requests by route, method and class of status."
        yield counters("http_requests", text, ("handler", "method", "status"), http.requests.items())
        text = "From a request's headers to the last byte of its response."
        yield histograms("http_request_duration_seconds", text, ("handler", "method"), http.seconds.items())
        text = "The same, of all routes together, in finer buckets."
        yield histograms("http_request_duration_highr_seconds", text, (), [((), http.all_seconds)])
        for name, text, sums in (
            ("http_request_size_bytes", "Bytes of request bodies, as announced.", http.request_bytes),
            ("http_response_size_bytes", "Bytes of response bodies.", http.response_bytes),
        ):
            summary = SummaryMetricFamily(name, text, labels=("handler",))
            for handler, (count, total) in sums.items():
                summary.add_metric((handler,), count, total)
            yield summary

    def _ours(self, engines: list[OfEngine], metrics: Metrics) -> Iterator[Metric]:
        yield gauges(f"{OURS}build_info", "1; the label is the version.", ("version",), [((__version__,), 1)])
        text = "1 if a request would be taken now."
        ready = [((model.name,), model.is_ready()) for model in self.models]
        yield gauges(f"{OURS}ready", text, _MODEL, ready)
        text = "1 if the engine would be given a request now."
        up = [(each.labels, each.status.phase == "ready") for each in engines]
        yield gauges(f"{OURS}engine_ready", text, _ENGINE, up)
        restarts = [(each.labels, each.status.restarts) for each in engines]
        replayed = [(each.labels, each.counts.num_replayed) for each in engines]
        quarantined = [(each.labels, each.counts.num_quarantined) for each in engines]
        yield counters(f"{OURS}engine_restarts", "Restarts of the engine.", _ENGINE, restarts)
        yield counters(f"{OURS}requests_replayed", "Requests that outlived an engine.", _ENGINE, replayed)
        yield counters(f"{OURS}requests_quarantined", "Requests that killed it twice.", _ENGINE, quarantined)
        text = "Time that the device waited for the host between steps; of one that runs ahead the least."
        gaps = [(each.labels, each.stats.step_gap_counts, each.stats.step_gap_us / 1e6) for each in engines]
        yield step_histogram(f"{OURS}step_gap_seconds", text, [us / 1e6 for us in STEP_GAP_BOUNDS], gaps)
        yield from self._steps(engines)
        text = "KV blocks that preempted requests took to swap space, and back."
        swapped = [((*each.labels, "out"), each.stats.blocks_swapped_out) for each in engines]
        swapped += [((*each.labels, "in"), each.stats.blocks_swapped_in) for each in engines]
        yield counters(f"{OURS}swapped_blocks", text, (*_ENGINE, "direction"), swapped)
        text = "Messages to the engine that no API server of its sends, or that came twice, late or cut."
        yield counters(
            f"{OURS}dropped_messages", text, _ENGINE, [(each.labels, each.stats.num_dropped) for each in engines]
        )
        text = "Connections without our key to the ports for engines and API servers of other machines."
        refused: _Rows = [((f"engine {each.labels[1]}",), each.stats.num_refused) for each in engines]
        yield counters(f"{OURS}refused_peers", text, ("port",), [*refused, (("head",), self._own.num_refused)])
        text = "Requests that API servers work on."
        yield gauges(f"{OURS}open_requests", text, _MODEL, [((name,), n) for name, n in metrics.num_open.items()])
        text = "Seconds that a phase of the engine's start took."
        seconds = self._own.startup_seconds.items()
        yield gauges(f"{OURS}startup_phase_seconds", text, ("phase", "engine"), seconds)
        uses = [((name, what), count) for name, counts in metrics.by_key.items() for what, count in counts.items()]
        text = "Requests, tokens and refusals by the name of the API key."
        yield counters(f"{OURS}key_usage", text, ("key", "kind"), uses)
        text = "Lines that API servers did not log, as nobody took them."
        yield counters(f"{OURS}log_lines_dropped", text, (), [((), metrics.num_lines_dropped)])
        text = "Times that a file was read again while the server ran."
        yield counters(f"{OURS}reloads", text, ("file", "outcome"), metrics.num_reloads.items())

    def _steps(self, engines: list[OfEngine]) -> Iterator[Metric]:
        """An engine that hangs says nothing: what it said last gets older here."""
        text = "Time of the engine's loop by what it did, and the steps in it; the device may work meanwhile."
        summary = SummaryMetricFamily(f"{OURS}step_seconds", text, labels=(*_ENGINE, "phase"))
        for each in engines:
            for phase, us in zip(STEP_PHASES, each.stats.phase_us or (0,) * len(STEP_PHASES), strict=True):
                summary.add_metric((*each.labels, phase), each.stats.steps, us / 1e6)
        yield summary
        text = "Since the engine's last step was over, or since its start."
        ages = [(each.labels, each.stats.step_age + each.stats_age) for each in engines]
        yield gauges(f"{OURS}last_step_age_seconds", text, _ENGINE, ages)
        text = "How long the request that has waited longest for a place waits; 0 if none does."
        waits: _Rows = [
            (each.labels, each.stats.waiting_seconds + each.stats_age if each.stats.num_waiting else 0)
            for each in engines
        ]
        yield gauges(f"{OURS}queue_oldest_seconds", text, _ENGINE, waits)
        text = "Share of the places in used KV blocks that no token has taken, 0 to 1."
        waste = [(each.labels, wasted(each.stats, each.cache.block_size)) for each in engines]
        yield gauges(f"{OURS}kv_waste_ratio", text, _ENGINE, waste)

    def _refused(self, engines: list[OfEngine]) -> Counter[tuple[str, str]]:
        """By model and reason: where too many wait, which engine would have had a request is chance."""
        reasons = {"max_num_queued_reqs": "admission_rejections", "time_limit": "num_late"}
        found = Counter({(model.name, reason): 0 for model in self.models for reason in reasons})
        for each in engines:
            for reason, count in reasons.items():
                found[each.labels[0], reason] += getattr(each.counts, count)
        return found

    def _gauge(self, name: str, text: str, rows: _Rows) -> Metric:
        return gauges(self._prefix + name, text, _ENGINE, rows)

    def _counter(self, name: str, text: str, rows: _Rows) -> Metric:
        return counters(self._prefix + name, text, _ENGINE, rows)


def sleep_state(status: Status) -> str:
    return "discard_all" if status.phase in ("unloaded", "failed") else "awake"


def usage(stats: EngineStats) -> float:
    """Share of KV blocks in use."""
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0


def wasted(stats: EngineStats, block_size: int) -> float:
    """Share of the places in used KV blocks that no token has taken."""
    return stats.empty_slots / (stats.kv_blocks_used * block_size) if stats.kv_blocks_used else 0.0


def host_usage(stats: EngineStats) -> float:
    """Share of the swap space in use."""
    return stats.host_blocks_used / stats.host_blocks_total if stats.host_blocks_total else 0.0


def gauges(name: str, text: str, labels: Sequence[str], rows: _Rows) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def counters(name: str, text: str, labels: Sequence[str], rows: _Rows) -> Metric:
    """On the wire the name gets ``_total``."""
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def histograms(name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], Histogram]]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in rows:
        family.add_metric(values, histogram.buckets(), histogram.total)
    return family


def step_histogram(
    name: str, text: str, bounds: Sequence[float], rows: Iterable[tuple[Sequence[str], Sequence[int], float]]
) -> Metric:
    """Of what an engine counts by step; ``rows``: labels, counts by bound, sum."""
    family = HistogramMetricFamily(name, text, labels=_ENGINE)
    names = [*map(str, map(float, bounds)), "+Inf"]
    for values, counts, total in rows:
        family.add_metric(values, list(zip(names, accumulate(counts or (0,) * len(names)), strict=True)), total)
    return family
