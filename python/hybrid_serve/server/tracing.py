"""Spans for an OpenTelemetry collector, where --otlp-traces-endpoint names one (S42). Needs the extra ``otel``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..client import ChoiceEvent
from ..config import ServerConfig
from ..errors import StartupError
from .generation import Generation
from .sse import Exchange

if TYPE_CHECKING:
    from opentelemetry.context import Context


class Tracing:
    """One span a generation; below it one for each of its phases, each chunk of a prompt and each time between a
    preemption and the next admission; all made when it has ended, from times that are kept anyway: a token costs
    nothing. Knows no socket: a thread of the library's sends them in batches."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "hybrid-serve", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("hybrid_serve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, generation: Generation, exchange: Exchange) -> None:
        """The caller's ``traceparent`` is the parent of the span."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        clock = time.time_ns() - time.monotonic_ns()
        begun, end = clock + round(generation.arrived * 1e9), time.time_ns()
        parent = self._propagator.extract(exchange.trace_headers)
        span = self._tracer.start_span(
            "llm_request", parent, SpanKind.SERVER, attributes=_attributes(generation, exchange), start_time=begun
        )
        if any(choice.finish_reason is None for choice in generation.choices):
            span.set_status(Status(StatusCode.ERROR, "unfinished"))
        below = set_span_in_context(span)
        for event, until in _with_ends(generation.events()):
            at = clock + round(event.at * 1e9)
            seen = {"choice": event.choice, "step.num_tokens": event.num_tokens, "step.num_seqs": event.num_seqs}
            if event.what not in ("first_token", "finished"):
                seen["tokens"] = event.value
            if event.what in _LASTING:
                lasting = self._tracer.start_span(event.what, below, attributes=seen, start_time=at)
                lasting.end(end if until is None else clock + round(until * 1e9))
            else:
                span.add_event(event.what, seen, at)
        self._phases(generation, below, begun)
        span.end(end)

    def _phases(self, generation: Generation, parent: Context, begun: int) -> None:
        timing = generation.timing()
        for name, seconds in timing.phases().items() if timing else ():
            phase = self._tracer.start_span(name, parent, start_time=begun)
            begun += round(seconds * 1e9)
            phase.end(begun)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


_LASTING = frozenset(("chunk", "preempted"))  # until the next event of the same choice


def _with_ends(events: Sequence[ChoiceEvent]) -> list[tuple[ChoiceEvent, float | None]]:
    """Each with the time of its choice's next one."""
    found: list[tuple[ChoiceEvent, float | None]] = []
    later: dict[int, float] = {}
    for event in reversed(events):
        found.append((event, later.get(event.choice)))
        later[event.choice] = event.at
    return found[::-1]


def _attributes(generation: Generation, exchange: Exchange) -> dict[str, Any]:
    usage, timing, params = generation.usage(), generation.timing(), generation.params
    found: dict[str, Any] = {
        "gen_ai.request.id": exchange.request_id,
        "gen_ai.response.model": generation.context.model_names[0],
        "gen_ai.request.n": generation.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.response.finish_reasons": [choice.finish_reason or "unfinished" for choice in generation.choices],
    }
    if timing is not None:
        found |= {
            "gen_ai.latency.time_in_queue": timing.queue,
            "gen_ai.latency.time_in_model_prefill": timing.prefill,
            "gen_ai.latency.time_in_model_decode": timing.decode,
            "gen_ai.latency.time_to_first_token": timing.queue + timing.prefill,
            "gen_ai.latency.e2e": timing.queue + timing.prefill + timing.decode,
            "hybrid.num_preemptions": timing.num_preemptions,
        }
    return found


def tracing(config: ServerConfig) -> Tracing | None:
    """None where no collector is named. Raises StartupError (HS-E045)."""
    endpoint = config.otlp_traces_endpoint
    if not endpoint:
        return None
    what = f"traces cannot be sent to {endpoint}"
    if not endpoint.startswith(("http://", "https://")):
        fix = "--otlp-traces-endpoint http://HOST:4318/v1/traces"
        raise StartupError("HS-E045", what, "it is no http:// or https:// address", fix)
    try:
        return Tracing(endpoint)
    except ImportError as error:
        raise StartupError("HS-E045", what, str(error), "pip install 'hybrid-serve[otel]'") from error
