"""Access log, request log, Server-Timing: what is written of a request, and what never is (S39, S41, P10, ADV-57)."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from api_harness import CHAT, COMPLETIONS, MESSAGES, Api, routes, says
from fake_engine import FakeEngine
from hybrid_serve import logging as log_lines
from hybrid_serve.errors import StartupError
from hybrid_serve.server.plugins import FAILED
from hybrid_serve.server.process import http_server
from hybrid_serve.shared_memory import SharedMemory, make

MakeApi = Callable[..., Api]
CANARIES = {"api_key": ("canary-key",), "admin_api_key": ("canary-admin",)}
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The JSON log of this process so far; the logging of this process is put back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("hybrid_serve")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    stream = io.StringIO()
    log_lines.configure("info", "api 0", ["canary-key"], stream, form="json")
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture
def plugged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module."""
    module = types.ModuleType("plugged_in")
    module.__dict__.update(
        redact=lambda text: re.sub("card [0-9]{8}", "card ***", text),
        fail=lambda text: 1 / len(text[:0]),
        forget=lambda text: None,
        word="no function",
    )
    monkeypatch.setitem(sys.modules, "plugged_in", module)


def test_nothing_is_written_of_a_request_by_default(api: Api, lines: Lines) -> None:
    api.chat()
    api.post(CHAT, {})
    assert lines() == []


def test_the_access_log_has_one_line_a_request(make_api: MakeApi, lines: Lines) -> None:
    api = make_api(access_log="all", **CANARIES)
    assert api.post(CHAT, {"messages": MESSAGES}, x_api_key="canary-key", x_request_id="r1").status_code == 200
    assert api.get("/v1/models?key=canary-query", authorization="Bearer canary-wrong").status_code == 401
    assert api.get("/live").status_code == 200
    assert api.get("/nope%0D%0AERROR%20status=200", x_api_key="canary-key").status_code == 404
    good, refused, unknown = lines()
    assert {"ts", "level", "process", "logger", "message"} <= set(good)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", good["ts"])
    shown = {name: good[name] for name in ("request_id", "key", "method", "path", "status", "process", "level")}
    assert shown == {
        "request_id": "r1", "key": "api-key-1", "method": "POST", "path": CHAT, "status": 200, "process": "api 0",
        "level": "info",
    }  # fmt: skip
    assert good["bytes"] > 100
    assert good["ms"] >= 0
    assert (refused["status"], refused["key"], refused["path"]) == (401, None, "/v1/models")
    assert (unknown["status"], unknown["path"]) == (404, "/nope%0D%0AERROR%20status%3D200")
    assert " status=404" in unknown["message"]
    assert "canary" not in json.dumps(lines())


def test_the_access_log_can_be_of_errors_only_and_skips_probes_that_succeed(make_api: MakeApi, lines: Lines) -> None:
    api = make_api(access_log="errors", disable_access_log_for_endpoints=("/version",))
    api.chat()
    api.post(CHAT, {})
    api.get("/version")
    assert [line["status"] for line in lines()] == [400]
    noisy = make_api(access_log="all", disable_access_log_for_endpoints=("/version",))
    noisy.get("/version")
    noisy.get("/live")
    assert [line["path"] for line in lines()[1:]] == ["/live"]


def test_a_client_that_left_is_a_499_in_the_log(make_api: MakeApi, lines: Lines) -> None:
    api = make_api(access_log="all")

    async def scenario() -> None:
        sent: list[Any] = []
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "root_path": "", "path": CHAT,
            "raw_path": CHAT.encode(), "query_string": b"", "client": ("::1", 5), "server": ("h", 1),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await api.app(scope, receive, send)
        assert sent == []

    api.run(scenario())
    assert [(line["status"], line["client"]) for line in lines()] == [(499, "::1:5")]


@pytest.mark.parametrize("level", ["meta", "prompt", "full"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_request_log_tells_numbers_and_words_only_where_asked_for(
    make_api: MakeApi, lines: Lines, level: str, stream: bool
) -> None:
    """S39"""
    engine = FakeEngine(says("canary-text, a long one"), cached_tokens=2, num_preemptions=1, prefill_seconds=1e-9)
    api = make_api(engine, log_requests=level, max_log_len=11, **CANARIES)
    body = {"prompt": "canary-prompt, a long one", "seed": 7, "n": 2, "stream": stream, "max_tokens": 50}
    response = api.post(COMPLETIONS, body, x_api_key="canary-key", x_request_id="r1")
    assert response.status_code == 200
    (line,) = lines()
    assert (line["request_id"], line["key"], line["seed"], line["n"]) == ("r1", "api-key-1", 7, 2)
    assert (line["finish"], line["cached_tokens"], line["preemptions"]) == ("stop,stop", 2, 2)
    assert line["completion_tokens"] > 4
    assert {"queue_ms", "prefill_ms", "decode_ms"} <= set(line)
    assert ("prompt" in line, "text" in line) == (level != "meta", level == "full")
    if level == "full":
        assert line["text"] == ["canary-text", "canary-text"]
    if level != "meta":
        assert line["prompt"] == ["canary-prom"]
    elif level == "meta":
        assert "canary" not in json.dumps(line)


@pytest.mark.parametrize(
    ("name", "prompt", "text"),
    [
        ("redact", "my card ***", "the card **"),
        ("fail", FAILED[:11], FAILED[:11]),
        ("forget", FAILED[:11], FAILED[:11]),
    ],
)
def test_a_function_of_the_user_says_what_of_a_text_may_be_logged(
    make_api: MakeApi, lines: Lines, plugged_in: None, name: str, prompt: str, text: str
) -> None:
    """S39: it sees whole texts, before they are cut; and nothing is logged of what it fails at."""
    log = {"log_requests": "full", "max_log_len": 11, "log_redactor": f"plugged_in.{name}"}
    api = make_api(FakeEngine(says("the card 87654321 of yours")), **log)
    assert api.post(COMPLETIONS, {"prompt": "my card 12345678 is", "max_tokens": 50}).status_code == 200
    *before, line = lines()
    assert (line["prompt"], line["text"]) == ([prompt], [text])
    assert not re.search("[0-9]{3}", line["message"].partition("prompt=")[2])
    failed = "--log-redactor failed with ZeroDivisionError"
    assert [each["message"] for each in before] == ([failed, failed] if name == "fail" else [])


@pytest.mark.parametrize(("name", "why"), [("word", "cannot be called"), ("none", "cannot be imported")])
def test_what_is_no_function_ends_the_start(make_api: MakeApi, plugged_in: None, name: str, why: str) -> None:
    """S39"""
    with pytest.raises(StartupError, match=why) as caught:
        make_api(log_redactor=f"plugged_in.{name}")
    assert caught.value.failure.code == "HS-E043"


def test_words_are_logged_and_a_stream_still_begins_before_its_last_token_is_made(
    make_api: MakeApi, lines: Lines
) -> None:
    """S22"""
    engine = FakeEngine(says("one two three"))
    engine.gates[2] = asyncio.Event()
    api = make_api(engine, log_requests="full")
    body = json.dumps({"messages": MESSAGES, "stream": True}).encode()
    pieces: list[bytes] = []
    has_text = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not engine.calls:
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Any) -> None:
        pieces.append(message.get("body", b""))
        if b'"content":"one' in pieces[-1]:
            has_text.set()

    async def ask() -> None:
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers}
        running = asyncio.ensure_future(api.app(scope, receive, send))
        await has_text.wait()
        assert not engine.gates[2].is_set(), "the last tokens are not made yet"
        assert lines() == [], "and the line is not written yet"
        engine.gates[2].set()
        await running

    api.run(ask())
    assert b"[DONE]" in b"".join(pieces)
    (line,) = lines()
    assert line["text"] == ["one two three"]


@pytest.mark.parametrize("options", [{}, {"disable_docs": True}])
def test_the_start_says_each_route_once_by_the_first_api_server(
    make_api: MakeApi, lines: Lines, options: dict[str, Any]
) -> None:
    """S16"""
    api = make_api(**options)
    http_server(api.context)
    (line,) = lines()
    assert line["message"].startswith("routes: ")
    said = [
        (method, path)
        for words in line["message"].removeprefix("routes: ").split(", ")
        for methods, path in [words.split(" ")]
        for method in methods.split("|")
    ]
    served = [(method, path.replace("demo", "{id}")) for method, path in routes(api)]
    assert sorted((method, path.replace("{id:path}", "{id}")) for method, path in said) == sorted(served)
    assert {("POST", CHAT), ("GET", "/ready"), ("PATCH", "/admin/config")} <= set(said)
    assert (("GET", "/docs") in said) == (not options)
    http_server(make_api(index=1, memory=SharedMemory(make(2), 2)).context)
    assert len(lines()) == 1


def test_server_timing_says_where_the_time_went(make_api: MakeApi) -> None:
    """P10: the phases follow each other without a gap."""
    engine = FakeEngine(says("one two three"), num_preemptions=3, prefill_seconds=0.0005)
    api = make_api(engine)
    response = api.post(CHAT, {"messages": MESSAGES})
    pattern = r"queue;dur=(\S+), prefill;dur=(\S+), decode;dur=(\S+), preempt;desc=3"
    match = re.fullmatch(pattern, response.headers["server-timing"])
    assert match, response.headers
    queue, prefill, decode = map(float, match.groups())
    assert queue >= 0
    assert 0 < prefill <= 0.5
    assert decode >= 0
    streamed = api.post(CHAT, {"messages": MESSAGES, "stream": True})
    assert re.fullmatch(pattern, streamed.headers["server-timing"]), "up to its first byte"
    assert "server-timing" not in api.post(CHAT, {}).headers


def test_a_key_of_the_file_is_masked_too(lines: Lines) -> None:
    log_lines.hide(["late-secret"])
    logging.getLogger("hybrid_serve").info("say late-secret", extra={"fields": {"more": "late-secret"}})
    (line,) = lines()
    assert (line["message"], line["more"]) == ("say ***", "***")


def test_a_traceback_is_one_line_of_json(lines: Lines) -> None:
    try:
        raise ValueError("two\nlines of canary-key")
    except ValueError:
        logging.getLogger("hybrid_serve").exception("failed")
    (line,) = lines()
    assert "Traceback" in line["traceback"]
    assert "canary" not in line["traceback"]
