"""Requests whose client is gone, and servers that shut down: F-12, F-13, F-39, S26, B11, B32."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from api_harness import CHAT, COMPLETIONS, MESSAGES, Api, events_of, says
from fake_engine import FACTS, Call, FakeEngine
from hybrid_serve.live import with_values
from hybrid_serve.wire import Status

MakeApi = Callable[..., Api]


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Waits for a condition; how long that took. Fails after ``seconds``."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not happen"
        await asyncio.sleep(0.001)
    return time.monotonic() - start


class Connection:
    """One HTTP request at the ASGI interface, whose client leaves when told to."""

    def __init__(self, api: Api, path: str, body: dict[str, Any]) -> None:
        self.api = api
        self.sent: list[dict[str, Any]] = []
        self._gone = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
                 "headers": headers, "http_version": "1.1", "root_path": "", "scheme": "http", "state": {}}  # fmt: skip
        app: Callable[..., Awaitable[None]] = api.app
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def leave(self) -> None:
        self._gone.set()

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


def blocked_engine(step: int) -> FakeEngine:
    """Gives ``step`` tokens and then nothing."""
    engine = FakeEngine(says("a b c d e f g h"))
    engine.gates[step] = asyncio.Event()
    return engine


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(("path", "fields"), [(CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": ["a", "b"]})])
def test_request_is_aborted_within_200_ms_of_its_client_leaving(
    make_api: MakeApi, path: str, fields: dict[str, Any], stream: bool, step: int
) -> None:
    """F-39, B11: in the queue or while decoding, streaming or not."""
    engine = blocked_engine(step)
    api = make_api(engine)

    async def scenario() -> None:
        connection = Connection(api, path, fields | {"stream": stream, "n": 2})
        prompts = len(fields.get("prompt", "x"))
        await until(lambda: len(engine.calls) == prompts and all(call.entered for call in engine.calls))
        if stream and step:
            await until(lambda: connection.text.count("data:") >= 3)
        connection.leave()
        assert await until(lambda: all(call.left for call in engine.calls)) < 0.2
        await connection.task
        assert all(call.unfinished_when_left == 2 for call in engine.calls)
        assert api.context.lifecycle.num_open == 0
        assert api.context.metrics.of(0).finished["abort"] == 2 * prompts
        assert "error" not in connection.text

    api.run(scenario())


def test_no_task_is_left_after_many_disconnects_at_random_moments(make_api: MakeApi) -> None:
    """F-39"""
    engine = FakeEngine(says("a b c d e f g h i j k l m n o p"))
    api = make_api(engine)

    async def scenario() -> None:
        before = len(asyncio.all_tasks())
        for round in range(200):
            body = {"messages": MESSAGES, "stream": round % 2 == 0}
            connection = Connection(api, CHAT, body)
            for _ in range(round % 23):
                await asyncio.sleep(0)
            connection.leave()
            await connection.task
        assert all(call.left for call in engine.calls if call.entered)
        assert api.context.lifecycle.num_open == 0
        assert len(asyncio.all_tasks()) == before

    api.run(scenario())


def test_silent_stream_is_kept_alive_by_comments(make_api: MakeApi) -> None:
    """B32: also before the first token."""
    for step in (0, 2):
        engine = blocked_engine(step)
        api = make_api(engine, sse_keep_alive_interval=0.02)

        async def scenario(engine: FakeEngine = engine, api: Api = api, step: int = step) -> None:
            connection = Connection(api, CHAT, {"messages": MESSAGES, "stream": True})
            await until(lambda: connection.text.count(": keep-alive\n\n") >= 3)
            engine.gates[step].set()
            await connection.task
            assert events_of(connection.text)[-1] == "[DONE]"
            assert connection.status == 200

        api.run(scenario())


def test_whole_answers_are_never_padded_with_comments(make_api: MakeApi) -> None:
    engine = blocked_engine(0)
    api = make_api(engine, sse_keep_alive_interval=0.01)

    async def scenario() -> None:
        connection = Connection(api, CHAT, {"messages": MESSAGES})
        await until(lambda: bool(engine.calls))
        for _ in range(5):
            await asyncio.sleep(0.01)  # several intervals pass in silence
        assert connection.sent == []
        engine.gates[0].set()
        await connection.task
        assert json.loads(connection.text)["choices"]

    api.run(scenario())


def test_draining_server_finishes_what_runs_and_refuses_what_comes(make_api: MakeApi) -> None:
    """F-12, S26"""
    engine = blocked_engine(3)
    api = make_api(engine)

    async def scenario() -> None:
        streams = [Connection(api, CHAT, {"messages": MESSAGES, "stream": i % 2 == 0}) for i in range(8)]
        await until(lambda: len(engine.calls) == 8)
        lifecycle = api.context.lifecycle
        lifecycle.begin_drain()
        drained = asyncio.ensure_future(lifecycle.drained(10.0))
        late = Connection(api, CHAT, {"messages": MESSAGES})
        await late.task
        assert late.status == 503
        assert json.loads(late.text)["error"]["code"] == "draining"
        headers = dict(late.sent[0]["headers"])
        assert headers[b"connection"] == b"close"
        assert int(headers[b"retry-after"]) > 0
        ready = await api.client.get("/ready")
        assert (ready.status_code, ready.json()["state"]) == (503, "draining")
        assert (await api.client.get("/live")).status_code == 200
        assert not drained.done()
        engine.gates[3].set()
        assert await drained
        for i, connection in enumerate(streams):
            await connection.task
            assert connection.status == 200
            assert connection.text.endswith("data: [DONE]\n\n") or i % 2

    api.run(scenario())


def test_requests_wait_for_the_model_where_that_is_wanted(make_api: MakeApi) -> None:
    """P20: until it is there, until it never will be, or until their client leaves; and not too many."""
    api = make_api(
        FakeEngine(says("a b c"), status=Status("loading_weights", 0.5), facts=None), queue_while_loading=True
    )
    api.context.config = with_values(api.context.config, {"max_num_queued_reqs": 3})

    async def scenario() -> None:
        lifecycle, engine = api.context.lifecycle, api.engine

        async def ask(count: int) -> list[Connection]:
            made = [Connection(api, CHAT, {"messages": MESSAGES, "stream": i % 2 == 0}) for i in range(count)]
            for _ in range(20):
                await asyncio.sleep(0)
            return made

        def code(connection: Connection) -> str:
            return str(json.loads(connection.text)["error"]["code"])

        first, second, leaver = await ask(3)
        (refused,) = await ask(1)
        assert (refused.status, code(refused)) == (503, "overloaded")
        assert b"retry-after" in dict(refused.sent[0]["headers"])
        leaver.leave()
        await leaver.task
        assert [each.sent for each in (first, second, leaver)] == [[], [], []]
        engine.status, engine.facts = Status("ready", 1.0), FACTS
        api.context.status_changed(engine.status)
        await asyncio.gather(first.task, second.task)
        assert (first.status, second.status) == (200, 200)
        assert first.text.endswith("data: [DONE]\n\n")
        assert lifecycle.num_open == 0
        for phase, last in (("restarting", "engine_dead"), ("not_responding", "draining")):
            engine.status = Status(phase)
            (waits,) = await ask(1)
            assert waits.sent == []
            if last == "draining":
                lifecycle.begin_drain()
            else:
                engine.status = Status("dead")
                api.context.status_changed(engine.status)
            await waits.task
            assert (waits.status, code(waits)) == (503, last)

    api.run(scenario())


def test_requests_that_outlast_the_drain_get_an_error_and_no_done(make_api: MakeApi) -> None:
    """F-13"""
    engine = blocked_engine(2)
    api = make_api(engine)

    async def scenario() -> None:
        stream = Connection(api, CHAT, {"messages": MESSAGES, "stream": True})
        whole = Connection(api, CHAT, {"messages": MESSAGES})
        await until(lambda: stream.text.count("data:") >= 2 and len(engine.calls) == 2)
        lifecycle = api.context.lifecycle
        lifecycle.begin_drain()
        assert not await lifecycle.drained(0.05)
        await asyncio.gather(stream.task, whole.task)
        assert await lifecycle.drained(1.0)
        assert json.loads(events_of(stream.text)[-1])["error"]["code"] == "draining"
        assert "[DONE]" not in stream.text
        assert whole.status == 503
        assert json.loads(whole.text)["error"]["code"] == "draining"
        assert all(call.left for call in engine.calls)

    api.run(scenario())


def test_slow_tokenising_does_not_hold_up_other_requests(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text leaves the event loop, so that /live answers while it is worked on."""
    import threading

    release = threading.Event()
    entered = threading.Event()
    tokenizer = api.context.text.tokenizer
    encode = type(tokenizer).encode

    def slow(self: Any, text: str, add_special_tokens: bool = True) -> Any:
        if len(text) > 20_000:
            entered.set()
            assert release.wait(10)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(type(tokenizer), "encode", slow)

    async def scenario() -> None:
        long = asyncio.ensure_future(
            api.client.post("/tokenize", json={"prompt": "word " * 5000}, headers={"content-type": "application/json"})
        )
        await until(entered.is_set)
        assert (await api.client.get("/live")).status_code == 200
        release.set()
        assert (await long).json()["count"] > 4000

    api.run(scenario())


def test_script_of_a_call_is_what_the_engine_was_asked_for() -> None:
    """The fake ends a reply where an engine would; the tests above rest on it."""
    engine = FakeEngine(lambda call, choice: [5, 6, 7])

    async def collect(call_stream: Any) -> list[int]:
        async with call_stream as stream:
            return [token async for outputs in stream for output in outputs for token in output.token_ids]

    from hybrid_serve.wire import SamplingParams

    params = SamplingParams(max_tokens=2, seed=1)
    assert asyncio.run(collect(engine.generate(b"\0\0\0\0", params))) == [5, 6]
    params = SamplingParams(max_tokens=9, seed=1)
    assert asyncio.run(collect(engine.generate(b"\0\0\0\0", params, eos_token_ids=(2,)))) == [5, 6, 7, 2]
    assert isinstance(engine.calls[0], Call)
