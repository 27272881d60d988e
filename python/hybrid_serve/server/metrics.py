"""What one API server counts. Written only from the event loop, so plain numbers suffice."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from time import monotonic
from typing import TYPE_CHECKING

from ..wire import SamplingParams, Status

if TYPE_CHECKING:
    from .generation import Choice

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_FIRST_TOKEN_SECONDS = (*_FIRST_TOKEN, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_REQUEST_SECONDS = (*_REQUEST, 960.0, 1920.0, 7680.0)
_COUNTS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
_PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
_HTTP = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_HTTP_FINE = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0)
_HTTP_FINE_SECONDS = (*_HTTP_FINE, 30.0, 60.0)
# Who asks these is a machine, every few seconds: it would hide the clients, and a 503 of /ready is no failed request.
NOT_COUNTED = frozenset(("/live", "/ready", "/health", "/ping", "/load", "/metrics", "/version"))

# Histogram of requests -> bounds of its buckets, what it counts. The buckets are those that vLLM's dashboards expect.
REQUEST_HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (_FIRST_TOKEN_SECONDS, "From a request's arrival to its first token."),
    "inter_token_latency_seconds": (_TOKEN, "From one token of a choice to its next."),
    "request_time_per_output_token_seconds": (_TOKEN, "Mean time between the tokens of one choice."),
    "e2e_request_latency_seconds": (_REQUEST_SECONDS, "From a request's arrival to its end."),
    "request_queue_time_seconds": (_REQUEST_SECONDS, "From a request's arrival to the first step it was part of."),
    "request_prefill_time_seconds": (_REQUEST_SECONDS, "From the first step to the first token."),
    "request_decode_time_seconds": (_REQUEST_SECONDS, "From the first token to the last."),
    "request_inference_time_seconds": (_REQUEST_SECONDS, "From the first step to the last token."),
    "request_prompt_tokens": (_COUNTS, "Tokens of a prompt."),
    "request_generation_tokens": (_COUNTS, "Tokens of a choice."),
    "request_max_num_generation_tokens": (_COUNTS, "Tokens of a request's longest choice."),
    "request_prefill_kv_computed_tokens": (_COUNTS, "Prompt tokens that were computed, not found in the cache."),
    "request_params_max_tokens": (_COUNTS, "max_tokens of a request."),
    "request_params_n": (_CHOICES, "n of a request."),
    "request_num_preemptions": (_PREEMPTIONS, "How often a choice lost its blocks for a while."),
}


# Counts as they cross between API servers: words joined by _JOINT -> numbers. Two of them are added number by number.
Flat = dict[str, list[float]]
_JOINT = "\x1f"


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

    def numbers(self) -> list[float]:
        return [*self.counts, self.total]

    def add(self, numbers: Sequence[float]) -> None:
        """Adds what ``numbers`` of another with the same bounds gave."""
        if len(numbers) == len(self.counts) + 1:
            self.counts = [mine + int(other) for mine, other in zip(self.counts, numbers, strict=False)]
            self.total += numbers[-1]

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many are not above it), as Prometheus wants them."""
        names = [*map(str, self.bounds), "+Inf"]
        return [(name, float(count)) for name, count in zip(names, accumulate(self.counts), strict=True)]


@dataclass
class HttpCounts:
    """By (handler, method): the route's path as the table of routes has it, or ``none``; never a client's text."""

    requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # and the class of the status: 2xx
    all_seconds: Histogram = field(default_factory=lambda: Histogram(_HTTP_FINE_SECONDS))
    seconds: dict[tuple[str, str], Histogram] = field(default_factory=dict)
    request_bytes: dict[str, list[int]] = field(default_factory=dict)  # by handler: how many, sum
    response_bytes: dict[str, list[int]] = field(default_factory=dict)

    def ended(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        if handler in NOT_COUNTED:
            return
        self.requests[handler, method, f"{status // 100}xx"] += 1
        self.all_seconds.observe(seconds)
        if (handler, method) not in self.seconds:
            self.seconds[handler, method] = Histogram(_HTTP)
        self.seconds[handler, method].observe(seconds)
        self._count_bytes(self.request_bytes, handler, 1, request_bytes)
        self._count_bytes(self.response_bytes, handler, 1, response_bytes)

    def flat(self) -> Flat:
        found: dict[tuple[str, ...], list[float]] = {("requests", *words): [n] for words, n in self.requests.items()}
        found["all_seconds",] = self.all_seconds.numbers()
        found |= {("seconds", *words): histogram.numbers() for words, histogram in self.seconds.items()}
        found |= {("request_bytes", handler): [*pair] for handler, pair in self.request_bytes.items()}
        found |= {("response_bytes", handler): [*pair] for handler, pair in self.response_bytes.items()}
        return {_JOINT.join(("http", *words)): numbers for words, numbers in found.items()}

    def add(self, words: list[str], numbers: Sequence[float]) -> None:
        match words:
            case ["requests", handler, method, status]:
                self.requests[handler, method, status] += int(numbers[0])
            case ["all_seconds"]:
                self.all_seconds.add(numbers)
            case ["seconds", handler, method]:
                self.seconds.setdefault((handler, method), Histogram(_HTTP)).add(numbers)
            case ["request_bytes", handler]:
                self._count_bytes(self.request_bytes, handler, int(numbers[0]), int(numbers[1]))
            case ["response_bytes", handler]:
                self._count_bytes(self.response_bytes, handler, int(numbers[0]), int(numbers[1]))

    @staticmethod
    def _count_bytes(sums: dict[str, list[int]], handler: str, count: int, size: int) -> None:
        pair = sums.setdefault(handler, [0, 0])
        pair[0] += count
        pair[1] += size


# Fields of RequestCounts that are one number.
_LOST = ("num_replayed", "num_quarantined")
_REFUSED = ("admission_rejections", "num_late")
_ENGINE_NUMBERS = ("prompt_tokens", "cached_tokens", "generation_tokens", *_REFUSED, *_LOST)


class RequestCounts:
    """What came of the requests of one engine. A request that changed engines counts where each thing happened."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.admission_rejections = 0
        self.num_late = 0  # requests that took, or would take, longer than they may
        self.num_replayed = self.num_quarantined = 0  # that were open when this engine died
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in REQUEST_HISTOGRAMS.items()}
        self._first = self.histograms["time_to_first_token_seconds"]
        self._next = self.histograms["inter_token_latency_seconds"]

    def started(self, params: SamplingParams, n: int) -> None:
        """Once a request."""
        self.observe("request_params_n", n)
        self.observe("request_params_max_tokens", params.max_tokens)

    def prompt(self, length: int) -> None:
        self.prompt_tokens += length
        self.observe("request_prompt_tokens", length)

    def first_tokens(self, seconds: float, count: int) -> None:
        self._first.observe(seconds)
        self.generation_tokens += count

    def next_tokens(self, seconds: float, count: int) -> None:
        self._next.observe(seconds)
        self.generation_tokens += count

    def choice_ended(self, choice: Choice, arrived: float, seconds: float, unfinished: str) -> None:
        """``unfinished``: the reason if it has none."""
        observe = self.observe
        self.finished[choice.finish_reason or unfinished] += 1
        observe("e2e_request_latency_seconds", seconds)
        observe("request_generation_tokens", choice.num_tokens)
        observe("request_num_preemptions", choice.num_preemptions)
        if choice.first_time:
            decode = choice.last_time - choice.first_time
            observe("request_queue_time_seconds", choice.first_time - arrived - choice.prefill_seconds)
            observe("request_prefill_time_seconds", choice.prefill_seconds)
            observe("request_decode_time_seconds", decode)
            observe("request_inference_time_seconds", choice.prefill_seconds + decode)
            if choice.num_tokens > 1:
                observe("request_time_per_output_token_seconds", decode / (choice.num_tokens - 1))

    def observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)

    def flat(self) -> dict[tuple[str, ...], list[float]]:
        found: dict[tuple[str, ...], list[float]] = {
            ("number", name): [getattr(self, name)] for name in _ENGINE_NUMBERS
        }
        found |= {("finished", reason): [count] for reason, count in self.finished.items()}
        return found | {("histogram", name): histogram.numbers() for name, histogram in self.histograms.items()}

    def add(self, words: list[str], numbers: Sequence[float]) -> None:
        match words:
            case ["number", name] if name in _ENGINE_NUMBERS:
                setattr(self, name, getattr(self, name) + int(numbers[0]))
            case ["finished", reason] if reason in self.finished:
                self.finished[reason] += int(numbers[0])
            case ["histogram", name] if name in self.histograms:
                self.histograms[name].add(numbers)


class Metrics:
    """The numbers of one API server; knows neither their names on the wire nor the engine's own."""

    def __init__(self) -> None:
        self.by_engine: dict[int, RequestCounts] = {}
        self.http = HttpCounts()
        self.by_key: dict[str, Counter[str]] = {}  # name of a key -> requests, tokens, refused
        self.startup_seconds: dict[tuple[str, str], float] = {}  # (phase, engine) ->
        self.num_reloads: Counter[tuple[str, str]] = Counter()  # (what, "ok" or "refused")
        self.num_lines_dropped = self._lines_of_process = 0  # of the log: nobody took them
        self.num_open: Counter[str] = Counter()  # by model: requests of this moment, as others are to know
        self.num_refused = 0  # connections at the port for headless engines: every API server is told the same

    def of(self, engine: int) -> RequestCounts:
        """Of the engine with that index."""
        if engine not in self.by_engine:
            self.by_engine[engine] = RequestCounts()
        return self.by_engine[engine]

    def lines_dropped(self, of_process: int) -> None:
        """How many this process has dropped so far."""
        self.num_lines_dropped += of_process - self._lines_of_process
        self._lines_of_process = of_process

    def refused(self, num: int) -> None:
        self.num_refused = num

    def status_changed(self, status: Status) -> None:
        """An engine's phase: how long each one took."""
        if status.phase in ("loading_weights", "allocating"):
            self.startup_seconds[status.phase, str(status.engine)] = status.seconds

    def replayed(self, engine: int, num_replayed: int, num_quarantined: int) -> None:
        """The engine died: how many requests were asked for again, and how many were given up."""
        counts = self.of(engine)
        counts.num_replayed += num_replayed
        counts.num_quarantined += num_quarantined

    def key_used(self, name: str, what: str, count: int = 1) -> None:
        self.by_key.setdefault(name, Counter())[what] += count

    def ended(self, arrived: float, choices: Sequence[Choice], n: int, unfinished: str) -> None:
        """Once a request, whichever way it ended; ``unfinished`` is the reason of choices that have none. The ``n``
        choices of one prompt follow each other."""
        seconds = monotonic() - arrived
        for choice in choices:
            self.of(choice.engine).choice_ended(choice, arrived, seconds, unfinished)
        for first in choices[::n]:  # the choices of one prompt share its blocks: it was looked up once
            counts = self.of(first.engine)
            counts.cached_tokens += first.cached_tokens
            if first.first_time:
                computed = len(first.prompt.token_ids) - first.cached_tokens
                counts.observe("request_prefill_kv_computed_tokens", computed)
        longest = max(choice.num_tokens for choice in choices)
        self.of(choices[0].engine).observe("request_max_num_generation_tokens", longest)

    def flat(self) -> Flat:
        """Everything that adds up over API servers."""
        found: dict[tuple[str, ...], list[float]] = {("open", name): [count] for name, count in self.num_open.items()}
        for engine, of_engine in self.by_engine.items():
            found |= {("engine", str(engine), *words): numbers for words, numbers in of_engine.flat().items()}
        found |= {("reloads", *words): [count] for words, count in self.num_reloads.items()}
        found["lines_dropped",] = [self.num_lines_dropped]
        for name, counts in self.by_key.items():
            found |= {("key", name, what): [count] for what, count in counts.items()}
        return {_JOINT.join(words): numbers for words, numbers in found.items()} | self.http.flat()

    def add(self, flat: Flat) -> None:
        """Adds what ``flat`` of another gave. Names that are not known here come from another version and are left."""
        for joined, numbers in flat.items():
            match joined.split(_JOINT):
                case ["open", name]:
                    self.num_open[name] += int(numbers[0])
                case ["engine", index, *words]:
                    self.of(int(index)).add(words, numbers)
                case ["lines_dropped"]:
                    self.num_lines_dropped += int(numbers[0])
                case ["reloads", what, outcome]:
                    self.num_reloads[what, outcome] += int(numbers[0])
                case ["key", name, what]:
                    self.key_used(name, what, int(numbers[0]))
                case ["http", *words]:
                    self.http.add(words, numbers)
