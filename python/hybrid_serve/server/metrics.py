"""Counters, gauges and histograms under the names that vLLM's dashboards query.

Written only from the event loop, so plain numbers suffice; prometheus_client asks for them when it is scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..client import EngineClient
from ..wire import SamplingParams

if TYPE_CHECKING:
    from .generation import Choice

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_FIRST_TOKEN_SECONDS = (*_FIRST_TOKEN, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_REQUEST_SECONDS = (*_REQUEST, 960.0, 1920.0, 7680.0)
_COUNTS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts by bucket; 0.2 us an observation."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = list(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        names = [*map(str, self.bounds), "+Inf"]
        return [(name, float(count)) for name, count in zip(names, accumulate(self.counts), strict=True)]


class Metrics(Collector):
    """The numbers of one API server; the engine's own come from its last STATS."""

    def __init__(self, client: EngineClient, prefix: str, model_name: str) -> None:
        self._client = client
        self._prefix = prefix
        self._labels = [model_name, "0"]
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.histograms = {
            "time_to_first_token_seconds": Histogram(_FIRST_TOKEN_SECONDS),
            "inter_token_latency_seconds": Histogram(_TOKEN),
            "request_time_per_output_token_seconds": Histogram(_TOKEN),
            "e2e_request_latency_seconds": Histogram(_REQUEST_SECONDS),
            "request_prompt_tokens": Histogram(_COUNTS),
            "request_generation_tokens": Histogram(_COUNTS),
            "request_params_max_tokens": Histogram(_COUNTS),
            "request_params_n": Histogram(_CHOICES),
        }
        self._first = self.histograms["time_to_first_token_seconds"]
        self._next = self.histograms["inter_token_latency_seconds"]
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def started(self, params: SamplingParams, n: int, prompt_lengths: Sequence[int]) -> None:
        self.histograms["request_params_n"].observe(n)
        self.histograms["request_params_max_tokens"].observe(params.max_tokens)
        for length in prompt_lengths:
            self.prompt_tokens += length
            self.histograms["request_prompt_tokens"].observe(length)

    def first_tokens(self, seconds: float, count: int) -> None:
        self._first.observe(seconds)
        self.generation_tokens += count

    def next_tokens(self, seconds: float, count: int) -> None:
        self._next.observe(seconds)
        self.generation_tokens += count

    def ended(self, arrived: float, choices: Sequence[Choice], cached_tokens: int, unfinished: str) -> None:
        """Once a request, whichever way it ended; ``unfinished`` is the reason of choices that have none."""
        seconds = monotonic() - arrived
        self.cached_tokens += cached_tokens
        for choice in choices:
            self.finished[choice.finish_reason or unfinished] += 1
            self.histograms["e2e_request_latency_seconds"].observe(seconds)
            self.histograms["request_generation_tokens"].observe(choice.num_tokens)
            if choice.num_tokens > 1:
                self.histograms["request_time_per_output_token_seconds"].observe(seconds / choice.num_tokens)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait for a place.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage)
        yield self._gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", usage)
        yield self._counter("num_preemptions", "Requests that lost their blocks for a while.", stats.num_preemptions)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits)
        yield self._counter("prompt_tokens", "Prompt tokens of all requests.", self.prompt_tokens)
        yield self._counter("prompt_tokens_cached", "Prompt tokens that were in the cache.", self.cached_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", self.generation_tokens)
        yield self._own_counter("engine_restarts", "Restarts of the engine.", self._client.status.restarts)
        yield self._own_counter("requests_replayed", "Requests that outlived an engine.", self._client.num_replayed)
        yield self._own_counter("requests_quarantined", "Requests that killed it twice.", self._client.num_quarantined)
        success = CounterMetricFamily(
            f"{self._prefix}request_success", "Choices by the way they ended.", labels=[*_LABELS, "finished_reason"]
        )
        for reason, count in self.finished.items():
            success.add_metric([*self._labels, reason], count)
        yield success
        for name, histogram in self.histograms.items():
            yield self._histogram(name, histogram)
        yield self._histogram("time_per_output_token_seconds", self._next)  # the older name of inter_token_latency

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _own_counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"hybrid:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _histogram(self, name: str, histogram: Histogram) -> Metric:
        text = name.replace("_", " ").capitalize() + "."
        family = HistogramMetricFamily(self._prefix + name, text, labels=_LABELS)
        family.add_metric(self._labels, histogram.buckets(), histogram.total)
        return family


_LABELS = ("model_name", "engine")
