"""What a request meets at its connection: refused there as the application would, or let in with a seat (F-44)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from api_harness import COMPLETIONS, Api, says
from fake_engine import Call, FakeEngine
from hybrid_serve.server.app import door_of
from hybrid_serve.server.connection import BoundedProtocol
from hybrid_serve.server.keys import Key, KeyRing
from hybrid_serve.wire import EngineStats, SamplingParams
from raw_http import Connect, error_code, request, response_of, served

MakeApi = Callable[..., Api]
BODY = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()


def call() -> Call:
    return Call([1], SamplingParams(seed=0), 1, 0, (), b"", entered=True)


def with_room_for(make_api: MakeApi, num: int, *, num_open: int = 2, **server: object) -> Api:
    """A server whose engine has ``num_open`` requests and may have ``num`` more."""
    engine = FakeEngine(says("one"), stats=EngineStats(may_run=1), calls=[call() for _ in range(num_open)])
    api = make_api(engine, **server)
    api.context.live.change({"max_num_queued_reqs": num_open + num - 1})
    api.context.take_news()
    return api


def ask(*headers: bytes, path: str = COMPLETIONS, body: bytes = BODY) -> bytes:
    return request(body, *headers, path=path)


def count_of(api: Api, status: str = "5xx") -> int:
    return api.context.metrics.http.requests[COMPLETIONS, "POST", status]


async def get(connect: Connect, *lines: bytes) -> int:
    reader, writer = await connect()
    writer.write(b"\r\n".join([*lines, b"Host: localhost", b"", b""]))
    return int((await reader.readuntil(b"\r\n")).split()[1])


def test_the_door_refuses_with_the_words_of_the_application_and_counts_as_it_does(make_api: MakeApi) -> None:
    at_door, inside = with_room_for(make_api, 0), with_room_for(make_api, 0)
    expected = inside.post(COMPLETIONS, BODY, x_request_id="mine")

    async def scenario() -> None:
        async with served(at_door) as connect:
            reader, writer = await connect()
            writer.write(ask(b"X-Request-Id: mine"))
            status, headers, body = await response_of(reader)
            assert (status, body) == (expected.status_code, expected.json())
            assert headers == dict(expected.headers)
            assert body["error"]["code"] == "overloaded"
            assert at_door.context.lifecycle.num_open == 0

    at_door.run(scenario())
    for api in (at_door, inside):
        assert count_of(api) == 1
        assert api.context.metrics.of(0).admission_rejections == 1
        assert api.context.metrics.http.request_bytes[COMPLETIONS] == [1, len(BODY)]


def test_a_refusal_at_the_door_starts_no_task_and_is_in_the_access_log(
    make_api: MakeApi, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = with_room_for(make_api, 0, access_log="errors")

    async def never(*_: object) -> None:
        raise AssertionError("the application ran")

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            await get(connect, b"GET /live HTTP/1.1")  # the application is loaded by the first connection
            monkeypatch.setattr(type(api.app), "__call__", never)
            writer.write(ask(b"X-Request-Id: mine"))
            assert (await response_of(reader))[0] == 503

    with caplog.at_level(logging.INFO, "hybrid_serve"):
        api.run(scenario())
    (line,) = [record.getMessage() for record in caplog.records if "access" in record.getMessage()]
    assert f"request_id=mine client=127.0.0.1:{line.split('127.0.0.1:')[1].split()[0]} method=POST" in line
    assert f"path={COMPLETIONS} status=503" in line


def test_a_connection_goes_on_after_a_refusal(make_api: MakeApi) -> None:
    """Also where more of the body comes behind the answer; requests that were sent at once are answered in order."""
    api = with_room_for(make_api, 0)

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            whole = ask(body=b"x" * 200_000)
            writer.write(whole[:300])
            assert error_code(await response_of(reader)) == (503, "overloaded")
            writer.write(whole[300:])
            writer.write(ask() + b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n" + ask())
            answers = [(await response_of(reader))[0] for _ in range(3)]
            assert answers == [503, 200, 503]
            api.engine.calls[0].left = True
            writer.write(ask())
            assert (await response_of(reader))[0] == 200

    api.run(scenario())


@pytest.mark.parametrize("sent", [ask(b"Connection: close"), ask().replace(b"HTTP/1.1", b"HTTP/1.0")])
def test_the_connection_ends_where_the_client_wants_it_to(make_api: MakeApi, sent: bytes) -> None:
    api = with_room_for(make_api, 0)

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            writer.write(sent)
            status, headers, _ = await response_of(reader)
            assert (status, headers["connection"]) == (503, "close")
            assert await asyncio.wait_for(reader.read(), 5) == b""

    api.run(scenario())


@pytest.mark.parametrize("headers", [[], [b"Connection: close"]])
def test_a_client_that_sends_its_body_no_further_is_not_waited_for(
    make_api: MakeApi, monkeypatch: pytest.MonkeyPatch, headers: list[bytes]
) -> None:
    """F-26"""
    monkeypatch.setattr(BoundedProtocol, "body_seconds", 0.2)
    api = with_room_for(make_api, 0)

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            writer.write(ask(*headers)[: -len(BODY)])
            assert (await response_of(reader))[0] == 503
            writer.write(BODY[:1])
            assert await asyncio.wait_for(reader.read(), 5) == b"", "it has one answer"

    api.run(scenario())


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (ask(), (401, "invalid_api_key")),
        (ask(b"Authorization: Bearer other"), (401, "invalid_api_key")),
        (ask(b"Authorization: Bearer secret", path="/tokenize"), (200, "")),
        (ask(b"Authorization: Bearer secret"), (503, "overloaded")),
    ],
)
def test_keys_come_first(make_api: MakeApi, sent: bytes, answer: tuple[int, str]) -> None:
    api = with_room_for(make_api, 0, api_key=("secret",))

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            writer.write(sent)
            status, _, body = await response_of(reader)
            assert (status, body.get("error", {}).get("code", "")) == answer

    api.run(scenario())
    assert api.context.metrics.by_key.get("api-key-1", Counter())["requests"] == (answer[0] in (200, 503))


def test_a_key_is_looked_up_once(make_api: MakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys are compared each time."""
    api = with_room_for(make_api, 1, api_key=("secret",))
    found: list[Key | None] = []
    find = KeyRing.find

    def counted(ring: KeyRing, candidates: Iterable[bytes]) -> Key | None:
        found.append(find(ring, candidates))
        return found[-1]

    monkeypatch.setattr(KeyRing, "find", counted)

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            writer.write(ask(b"Authorization: Bearer secret"))
            assert (await response_of(reader))[0] == 200

    api.run(scenario())
    assert len(found) == 1


def test_a_key_that_has_used_up_its_own_limit_hears_of_that(make_api: MakeApi, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("- {name: ours, key: secret, requests_per_minute: 1}")
    file.chmod(0o600)
    api = with_room_for(make_api, 0, api_key_file=str(file))

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            for answer in ((503, "overloaded"), (429, "rate_limit_exceeded")):
                writer.write(ask(b"Authorization: Bearer secret"))
                assert error_code(await response_of(reader)) == answer

    api.run(scenario())


def test_a_host_that_is_not_this_machine_and_a_shutdown_come_first(make_api: MakeApi) -> None:
    api = with_room_for(make_api, 0)

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            writer.write(ask().replace(b"Host: localhost", b"Host: evil.example"))
            assert error_code(await response_of(reader)) == (403, "host_not_allowed")
            api.context.lifecycle.begin_drain()
            writer.write(ask())
            assert error_code(await response_of(reader)) == (503, "draining")

    api.run(scenario())


def test_with_middleware_of_others_the_application_refuses_itself(make_api: MakeApi) -> None:
    api = with_room_for(make_api, 0, allowed_origins=("https://a.example",))

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            writer.write(ask(b"Origin: https://a.example"))
            status, headers, _ = await response_of(reader)
            assert (status, headers["access-control-allow-origin"]) == (503, "https://a.example")

    api.run(scenario())


def test_requests_on_their_way_count_and_begin_one_after_the_other(make_api: MakeApi) -> None:
    """Of twenty at once there is room for five: the others are refused though no engine has been asked yet."""
    api = with_room_for(make_api, 5)
    api.engine.gates[0] = asyncio.Event()

    async def scenario() -> None:
        async with served(api) as connect:
            pairs = [await connect() for _ in range(20)]
            for _, writer in pairs:
                writer.write(ask())
            answers = [asyncio.ensure_future(response_of(reader)) for reader, _ in pairs]
            refused, open_ones = await asyncio.wait(answers, timeout=2)
            assert [each.result()[0] for each in refused] == [503] * 15
            assert len(open_ones) == 5
            assert len(api.engine.calls) == 2 + 5
            api.engine.gates[0].set()
            assert [each[0] for each in await asyncio.gather(*open_ones)] == [200] * 5
            reader, writer = await connect()
            writer.write(ask())
            assert (await response_of(reader))[0] == 200, "there is room again"

    api.run(scenario())


def test_a_few_begin_in_a_turn_and_one_while_others_wait_to_be_refused_and_it_could_not_run(make_api: MakeApi) -> None:
    api = with_room_for(make_api, 100)
    door, begun, per_turn = door_of(api.context), list[int](), list[int]()
    scope = {"path": COMPLETIONS, "headers": [(b"host", b"localhost")]}

    def let_in(number: int) -> None:
        door.let_in({**scope, "state": {}}, None, lambda: True, lambda app: begun.append(number))

    async def scenario(num: int, behind: bool) -> list[int]:
        door.is_behind = lambda: behind
        begun.clear()
        per_turn.clear()
        for number in range(num):
            let_in(number)
        while len(begun) < num:
            per_turn.append(len(begun))
            await asyncio.sleep(0)
        assert begun == list(range(num))
        return per_turn

    assert api.run(scenario(40, behind=False)) == [16, 32]
    assert api.run(scenario(5, behind=True)) == [1, 2, 3, 4]
    for each in api.engine.calls:
        each.left = True
    assert api.run(scenario(40, behind=True)) == [16, 32], "an engine that has nothing to do comes first"


def test_nobody_keeps_a_seat_who_does_not_come_as_far_as_an_engine(make_api: MakeApi) -> None:
    """A method that there is not, a body that is no JSON, one that is still to come (F-26), a client that is gone."""
    api = with_room_for(make_api, 1)

    async def scenario() -> None:
        async with served(api) as connect:
            assert await get(connect, f"GET {COMPLETIONS} HTTP/1.1".encode()) == 405
            _, slow = await connect()
            slow.write(ask()[: -len(BODY)])
            _, gone = await connect()
            gone.write(ask(body=b"{")[:-1])
            gone.transport.abort()
            await asyncio.sleep(0.1)
            for body, status in ((b"no json", 400), (BODY, 200), (BODY, 200)):
                reader, writer = await connect()
                writer.write(ask(body=body))
                assert (await response_of(reader))[0] == status

    api.run(scenario())
    assert api.context.entrance.num_entering == 0


def test_strangers_take_no_seat(make_api: MakeApi) -> None:
    """However many come without a key, who has one finds room."""
    api = with_room_for(make_api, 1, api_key=("secret",))

    async def scenario() -> None:
        async with served(api) as connect:
            pairs = [await connect() for _ in range(30)]
            for _, writer in pairs[:-1]:
                writer.write(ask())
            pairs[-1][1].write(ask(b"Authorization: Bearer secret"))
            answers = await asyncio.gather(*(response_of(reader) for reader, _ in pairs))
            assert [each[0] for each in answers] == [401] * 29 + [200]

    api.run(scenario())
