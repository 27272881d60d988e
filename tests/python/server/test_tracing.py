"""Traces, as a collector receives them (S42)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from api_harness import CHAT, MESSAGES, Api, says
from fake_engine import FakeEngine
from hybrid_serve.client import ChoiceEvent
from hybrid_serve.config import ServerConfig
from hybrid_serve.errors import StartupError
from hybrid_serve.server.tracing import tracing

MakeApi = Callable[..., Api]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Its address, and the spans it has received."""
    spans: list[Any] = []

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            message = ExportTraceServiceRequest.FromString(_plain(body, self.headers["content-encoding"]))
            spans.extend(span for sent in message.resource_spans for scope in sent.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Sink) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()
        thread.join()


def _plain(body: bytes, encoding: str | None) -> bytes:
    import gzip

    return gzip.decompress(body) if encoding == "gzip" else body


def test_a_request_is_a_span_below_its_callers_with_its_phases_below_it(
    make_api: MakeApi, collector: tuple[str, list[Any]]
) -> None:
    """S42"""
    address, spans = collector
    begun = time.monotonic()
    steps = [
        ChoiceEvent(0, begun, "admitted", 4, "sequences", 12, 3),
        ChoiceEvent(0, begun, "chunk", 8, num_tokens=12, num_seqs=3),
        ChoiceEvent(0, begun + 0.001, "preempted", 9, num_tokens=2, num_seqs=2),
        ChoiceEvent(0, begun + 0.002, "admitted", 4),
        ChoiceEvent(0, begun + 0.002, "chunk", 5, num_tokens=5, num_seqs=1),
        ChoiceEvent(0, begun + 0.003, "first_token"),
    ]
    engine = FakeEngine(says("one two three"), prefill_seconds=1e-4, num_preemptions=1, events=lambda: steps)
    api = make_api(engine)
    api.context.tracing = tracing(ServerConfig(otlp_traces_endpoint=address))
    before = time.time_ns()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x_request_id": "r1"}
    assert api.post(CHAT, {"messages": MESSAGES, "n": 2}, **headers).status_code == 200
    after = time.time_ns()
    assert api.context.tracing is not None
    api.context.tracing.close()
    api.context.tracing = None
    assert sorted({span.name for span in spans}) == ["chunk", "decode", "llm_request", "preempted", "prefill", "queue"]
    by_name = {span.name: span for span in spans}
    root = by_name["llm_request"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert before - 10**7 < root.start_time_unix_nano < root.end_time_unix_nano < after + 10**7
    at = root.start_time_unix_nano
    for name in ("queue", "prefill", "decode"):
        phase = by_name[name]
        assert (phase.trace_id, phase.parent_span_id) == (root.trace_id, root.span_id)
        assert phase.start_time_unix_nano == at
        at = phase.end_time_unix_nano
    assert at <= root.end_time_unix_nano + 1000
    assert [event.name for event in root.events] == ["admitted", "admitted", "first_token"]
    first, again = sorted((span for span in spans if span.name == "chunk"), key=lambda span: span.start_time_unix_nano)
    assert {each.key: each.value.int_value for each in first.attributes} == {
        "choice": 0, "tokens": 8, "step.num_tokens": 12, "step.num_seqs": 3,
    }  # fmt: skip
    preempted = by_name["preempted"]
    in_order = [first, preempted, again]
    assert {(span.trace_id, span.parent_span_id) for span in in_order} == {(root.trace_id, root.span_id)}
    for span, later in pairwise(in_order):
        assert span.end_time_unix_nano - span.start_time_unix_nano == 10**6
        assert span.end_time_unix_nano == later.start_time_unix_nano
    assert abs(root.events[0].time_unix_nano - before) < 10**9
    attributes = {each.key: each.value for each in root.attributes}
    assert attributes["gen_ai.request.id"].string_value == "r1"
    assert attributes["gen_ai.usage.completion_tokens"].int_value > 4
    assert [one.string_value for one in attributes["gen_ai.response.finish_reasons"].array_value.values] == ["stop"] * 2
    assert "content" not in str(root), "no prompt, no text"


def test_nothing_is_loaded_and_nothing_sent_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing(ServerConfig()) is None
    with pytest.raises(StartupError, match="no http:// or https:// address"):
        tracing(ServerConfig(otlp_traces_endpoint="collector:4317"))
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError) as caught:
        tracing(ServerConfig(otlp_traces_endpoint="http://127.0.0.1:1"))
    assert caught.value.failure.fix == "pip install 'hybrid-serve[otel]'"
