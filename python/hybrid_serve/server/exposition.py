"""/metrics: the counts of all API servers and the engine's own, under the names that dashboards query.

docs/reference/metrics.md lists every name. Those with ``--metrics-prefix`` are vLLM's, ``http_`` and ``process_`` ones
are as the usual libraries call them, ``hybrid:`` ones are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
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
from ..wire import STEP_TOKEN_BOUNDS, EngineStats
from .lifecycle import Lifecycle
from .metrics import REQUEST_HISTOGRAMS, Flat, Histogram, Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OURS = "hybrid:"
_MODEL = ("model_name",)
_ENGINE = ("model_name", "engine")
_Rows = Iterable[tuple[Sequence[str], float]]


class Exposition(Collector):
    """Turns the numbers into text when somebody asks; counts nothing itself."""

    def __init__(
        self, metrics: Metrics, client: EngineClient, lifecycle: Lifecycle, cache: CacheConfig, prefix: str, model: str
    ) -> None:
        self._own, self._client, self._lifecycle, self._cache = metrics, client, lifecycle, cache
        self.others: Callable[[], list[Flat]] = list  # the counts of other API servers
        self._prefix, self._model = prefix, model
        self._labels = (model, "0")
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        stats, metrics = self._client.stats, self._all()
        yield from self._engine(stats)
        yield from self._older_names(stats, metrics)
        yield from self._requests(metrics)
        yield from self._http(metrics)
        yield from self._ours(metrics)

    def _all(self) -> Metrics:
        """The counts of every API server together."""
        self._own.num_open = self._lifecycle.num_open
        metrics = Metrics()
        for flat in (self._own.flat(), *self.others()):
            metrics.add(flat)
        return metrics

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait for a place.", stats.num_waiting)
        reasons = [((*self._labels, "capacity"), stats.num_waiting), ((*self._labels, "deferred"), 0)]
        name, text = f"{self._prefix}num_requests_waiting_by_reason", "Requests that wait, by what they wait for."
        yield gauges(name, text, (*_ENGINE, "reason"), reasons)
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage(stats))
        yield self._counter("num_preemptions", "Requests that lost their blocks for a while.", stats.num_preemptions)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits)
        facts = self._client.facts
        info = {name: str(value) for name, value in vars(self._cache).items()} | {"engine": "0"}
        info["num_gpu_blocks"] = str(facts.num_blocks) if facts is not None else "0"
        text = "1; the labels are the configuration of the cache."
        yield gauges(f"{self._prefix}cache_config_info", text, tuple(info), [(tuple(info.values()), 1)])
        counts = stats.step_token_counts or (0,) * (len(STEP_TOKEN_BOUNDS) + 1)
        steps = HistogramMetricFamily(f"{self._prefix}iteration_tokens_total", "Tokens of a step.", labels=_ENGINE)
        bounds = [*map(str, map(float, STEP_TOKEN_BOUNDS)), "+Inf"]
        steps.add_metric(self._labels, list(zip(bounds, accumulate(counts), strict=True)), stats.step_tokens)
        yield steps

    def _older_names(self, stats: EngineStats, metrics: Metrics) -> Iterator[Metric]:
        """What dashboards of earlier years query; nothing is swapped here, hence the zeros."""
        yield self._gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", usage(stats))
        yield self._gauge("cpu_cache_usage_perc", "Older name: share of swap space in use; there is none.", 0)
        yield self._gauge("num_requests_swapped", "Older name: requests in swap space; there is none.", 0)
        yield self._counter("gpu_prefix_cache_queries", "Older name of prefix_cache_queries.", stats.prefix_queries)
        yield self._counter("gpu_prefix_cache_hits", "Older name of prefix_cache_hits.", stats.prefix_hits)
        latency = metrics.histograms["inter_token_latency_seconds"]
        text = "Older name of inter_token_latency_seconds."
        yield histograms(f"{self._prefix}time_per_output_token_seconds", text, _ENGINE, [(self._labels, latency)])

    def _requests(self, metrics: Metrics) -> Iterator[Metric]:
        labels = self._labels
        computed = metrics.prompt_tokens - metrics.cached_tokens
        yield self._counter("prompt_tokens", "Prompt tokens of all requests.", metrics.prompt_tokens)
        by_source = [((*labels, "local_compute"), computed), ((*labels, "local_cache_hit"), metrics.cached_tokens)]
        name, text = f"{self._prefix}prompt_tokens_by_source", "Prompt tokens by where their KV came from."
        yield counters(name, text, (*_ENGINE, "source"), by_source)
        yield self._counter("prompt_tokens_cached", "Prompt tokens that were in the cache.", metrics.cached_tokens)
        name, text = f"{self._prefix}prompt_tokens_cached_by_source", "Prompt tokens in the cache, by which."
        yield counters(name, text, (*_ENGINE, "source"), [((*labels, "device"), metrics.cached_tokens)])
        yield self._counter("generation_tokens", "Tokens generated.", metrics.generation_tokens)
        ends = [((*labels, reason), count) for reason, count in metrics.finished.items()]
        name, text = f"{self._prefix}request_success", "Choices by the way they ended."
        yield counters(name, text, (*_ENGINE, "finished_reason"), ends)
        name, text = f"{self._prefix}admission_rejections", "Requests refused because too many wait."
        refused = [((self._model, "max_num_queued_reqs"), metrics.admission_rejections)]
        yield counters(name, text, (*_MODEL, "reason"), refused)
        for name, (_, text) in REQUEST_HISTOGRAMS.items():
            yield histograms(self._prefix + name, text, _ENGINE, [(labels, metrics.histograms[name])])

    def _http(self, metrics: Metrics) -> Iterator[Metric]:
        http = metrics.http
        text = "Requests by route, method and class of status."
        yield counters("http_requests", text, ("handler", "method", "status"), http.requests.items())
        text = "From a request's headers to the last byte of its response."
        yield histograms("http_request_duration_seconds", text, ("handler", "method"), http.seconds.items())
        for name, text, sums in (
            ("http_request_size_bytes", "Bytes of request bodies, as announced.", http.request_bytes),
            ("http_response_size_bytes", "Bytes of response bodies.", http.response_bytes),
        ):
            summary = SummaryMetricFamily(name, text, labels=("handler",))
            for handler, (count, total) in sums.items():
                summary.add_metric((handler,), count, total)
            yield summary

    def _ours(self, metrics: Metrics) -> Iterator[Metric]:
        yield gauges(f"{OURS}build_info", "1; the label is the version.", ("version",), [((__version__,), 1)])
        text = "1 if a request would be taken now."
        yield gauges(f"{OURS}ready", text, _MODEL, [((self._model,), self._lifecycle.phase() == "ready")])
        yield self._own_counter("engine_restarts", "Restarts of the engine.", self._client.status.restarts)
        yield self._own_counter("requests_replayed", "Requests that outlived an engine.", metrics.num_replayed)
        yield self._own_counter("requests_quarantined", "Requests that killed it twice.", metrics.num_quarantined)
        text = "Requests that API servers work on."
        yield gauges(f"{OURS}open_requests", text, _MODEL, [((self._model,), metrics.num_open)])
        text = "Seconds that a phase of the engine's start took."
        yield gauges(
            f"{OURS}startup_phase_seconds", text, ("phase",), (((p,), s) for p, s in self._own.startup_seconds.items())
        )
        uses = [((name, what), count) for name, counts in metrics.by_key.items() for what, count in counts.items()]
        text = "Requests, tokens and refusals by the name of the API key."
        yield counters(f"{OURS}key_usage", text, ("key", "kind"), uses)
        text = "Times that a file was read again while the server ran."
        yield counters(f"{OURS}reloads", text, ("file", "outcome"), metrics.num_reloads.items())

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return gauges(self._prefix + name, text, _ENGINE, [(self._labels, value)])

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return counters(self._prefix + name, text, _ENGINE, [(self._labels, value)])

    def _own_counter(self, name: str, text: str, value: float) -> Metric:
        return counters(OURS + name, text, _ENGINE, [(self._labels, value)])


def usage(stats: EngineStats) -> float:
    """Share of KV blocks in use."""
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0


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
