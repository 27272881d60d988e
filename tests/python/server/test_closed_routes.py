"""No spelling of a path and no Host opens a route that needs a key: bytes on a socket (ADV-42, ADV-44)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from api_harness import PUBLIC, Api, routes
from raw_http import response_of, served

MakeApi = Callable[..., Api]
SPELLINGS = [
    "/{0}", "//{0}", "///{0}", "/{0}/", "/{0}//", "/./{0}", "/live/../{0}", "/live/{0}", "/{0}/../live", "/%2e/{0}",
    "/live/%2e%2e/{0}", "/live%2F..%2F{0}", "/%2F{0}", "/{0}%2F", "/{0}%00", "/{0};/live", "/{0}?/live", "/{0}%3F/live",
    "/{0}%23/live", "/{0}%20", "/LIVE/../{0}", "/live;/../{0}", "/live%00/{0}", "/{0}/live", "/health/{0}",
    "/proxy/{0}", "/proxy/live/../{0}", "http://localhost/{0}", "http://live/{0}", "http://localhost/live/../{0}",
]  # fmt: skip


@pytest.mark.parametrize("root_path", ["", "/proxy"])
def test_no_spelling_of_a_path_opens_a_closed_route(make_api: MakeApi, root_path: str) -> None:
    """ADV-42: as bytes on a socket, so that no client tidies the target up."""
    api = make_api(api_key=("secret",), admin_api_key=("boss",), root_path=root_path)
    statuses: Counter[int] = Counter()

    async def scenario() -> None:
        async with served(api) as connect:
            reader, writer = await connect()
            for method, path in {*routes(api)}:
                for spelling in SPELLINGS if path not in PUBLIC else ():
                    for name in (path[1:], path[1:].upper()):
                        target = spelling.format(name).encode()
                        writer.write(b"%s %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (method.encode(), target))
                        status, _, body = await response_of(reader)
                        assert status == 401, (target, body)
                        statuses[status] += 1
            for target in (b"*", b"live", b"metrics", b"localhost:80", b"http:///metrics"):  # no paths
                reader, writer = await connect()
                writer.write(b"OPTIONS %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % target)
                assert (await response_of(reader))[0] in (400, 401), target

    api.run(scenario())
    assert statuses[401] > 600


HOSTS = [
    "localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:1", "127.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]:8",
    "evil.example", "evil.example:8000", "localhost.evil.example", "evil.example#localhost", "localhost@evil.example",
    "127.0.0.1.nip.io", "10.0.0.1", "169.254.169.254", "metadata.google.internal", "0x7f000001", "2130706433",
    "localhost.",
    "LOCALHOST", "live", "/live", "live/", "/live?", "a\\live", "localhost/live", "localhost:8000/live", "*", "[", "]",
    "[]", ":", ":80", "localhost:99999", "localhost:-1", "a" * 200, "xn--localhst-0za", "",
]  # fmt: skip
TRICKS = [
    "/{0}", "//{0}", "/{0}/", "/./{0}", "/live/../{0}", "/live/..;/{0}", "/%2e/{0}", "/live%2F..%2F{0}", "/{0};/live",
    "/{0}.", "/{0}%00", "http://localhost/live/../{0}", "http://user@live/{0}",
]  # fmt: skip


def test_no_host_and_spelling_together_open_a_closed_route(make_api: MakeApi) -> None:
    """Every route of the application, with every Host and every trick of a path (RELIABILITY 6, ADV-42, ADV-44)."""
    api = make_api(api_key=("secret",), admin_api_key=("boss",))
    closed = [(method, path[1:]) for method, path in routes(api) if path not in PUBLIC]
    assert len(closed) >= 10
    statuses: Counter[int] = Counter()

    async def ask_all(connect: Any, requests: list[bytes]) -> None:
        """Several on their way at once; another connection where one is refused so hard that it ends."""
        reader, writer = await connect()
        for start in range(0, len(requests), 20):
            some = requests[start : start + 20]
            writer.writelines(some)
            for request in some:
                try:
                    status, headers, body = await response_of(reader)
                except asyncio.IncompleteReadError:
                    status, headers, body = 0, {"connection": "close"}, None
                assert status in (0, 400, 401), (request, body)
                statuses[status] += 1
                if headers.get("connection") == "close":
                    reader, writer = await connect()
                    break

    async def scenario() -> None:
        async with served(api) as connect:
            for method, path in closed:
                for trick in TRICKS:
                    target = trick.format(path)
                    heads = [f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() for host in HOSTS]
                    await ask_all(connect, heads)

    api.run(scenario())
    assert statuses[401] > 0.95 * len(closed) * len(TRICKS) * len(HOSTS)
