"""HTTPS: certificates that change under load, clients that must not get in, stalled handshakes (S24, F-57, F-58)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import ssl
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from api_harness import MESSAGES, Api, says
from fake_engine import FakeEngine
from hybrid_serve.config import ServerConfig
from hybrid_serve.errors import StartupError
from hybrid_serve.server import file_watch, process
from hybrid_serve.server.connection import BoundedProtocol
from hybrid_serve.server.file_watch import watch
from hybrid_serve.server.process import watched_files
from hybrid_serve.server.tls import Certificate, certificate
from raw_http import Writer, error_code, request, response_of, served

MakeApi = Callable[..., Api]
GET = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def write_pair(directory: Path, issued: trustme.LeafCert) -> dict[str, str]:
    """The options that serve it. Files are replaced as a tool would: each at once, one after the other."""
    paths = {"ssl_keyfile": directory / "key.pem", "ssl_certfile": directory / "cert.pem"}
    blobs = {"ssl_keyfile": issued.private_key_pem.bytes(), "ssl_certfile": issued.cert_chain_pems[0].bytes()}
    for name, path in paths.items():
        other = path.with_suffix(".new")
        other.write_bytes(blobs[name])
        os.replace(other, path)
    return {name: str(path) for name, path in paths.items()}


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


def serial_of(writer: Writer) -> int:
    return int(writer.get_extra_info("peercert")["serialNumber"], 16)


def certified(**options: object) -> Certificate:
    found = certificate(ServerConfig(**options))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_new_connections_get_the_new_certificate_and_an_open_stream_is_not_cut(
    make_api: MakeApi, tmp_path: Path, ca: trustme.CA, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S24, F-57: within a second; half a pair, no pair and no file leave the old one in use."""
    monkeypatch.setattr(file_watch, "INTERVAL", 0.02)
    options = write_pair(tmp_path, ca.issue_cert("127.0.0.1"))
    engine = FakeEngine(says("one two three four"))
    engine.gates[2] = asyncio.Event()
    api = make_api(engine, **options)
    used = certified(**options)
    outcomes = api.context.metrics.num_reloads

    async def scenario() -> None:
        async with served(api, used) as connect:
            watching = asyncio.ensure_future(watch(watched_files(api.context, used), outcomes))

            async def serial() -> int:
                reader, writer = await connect(trusting(ca))
                writer.write(GET)
                assert (await response_of(reader))[0] == 200
                return serial_of(writer)

            first = await serial()
            stream, writer = await connect(trusting(ca))
            writer.write(request(json.dumps({"messages": MESSAGES, "stream": True}).encode()))
            await stream.readuntil(b"content")
            seen = {first}
            for _ in range(5):
                write_pair(tmp_path, ca.issue_cert("127.0.0.1"))
                written = time.monotonic()
                while (new := await serial()) in seen:
                    assert time.monotonic() - written < 1.0
                seen.add(new)
            for bad in (
                b"",
                b"-----BEGIN CERTIFICATE-----\nhalf",
                trustme.CA().issue_cert("x").cert_chain_pems[0].bytes(),
            ):
                refused = outcomes["certificate", "refused"]
                (tmp_path / "cert.pem").write_bytes(bad)
                while outcomes["certificate", "refused"] == refused:
                    await asyncio.sleep(0.01)
                assert await serial() == new
            write_pair(tmp_path, ca.issue_cert("127.0.0.1"))
            while await serial() == new:
                await asyncio.sleep(0.01)
            engine.gates[2].set()
            assert b"[DONE]" in await asyncio.wait_for(stream.readuntil(b"[DONE]"), 5)
            watching.cancel()

    with caplog.at_level(logging.INFO, logger="hybrid_serve"):
        api.run(scenario())
    assert "the new certificate is not used, the old one stays" in caplog.text


def test_certificates_change_under_load_and_no_stream_is_cut(make_api: MakeApi, tmp_path: Path, ca: trustme.CA) -> None:
    """F-57: at the pace at which files are looked at in earnest, a bad pair between two good ones."""
    options = write_pair(tmp_path, ca.issue_cert("127.0.0.1"))
    api = make_api(FakeEngine(says("one two three four")), **options)
    used = certified(**options)
    outcomes = api.context.metrics.num_reloads
    body = request(json.dumps({"messages": MESSAGES, "stream": True}).encode())
    trust = trusting(ca)

    async def scenario() -> None:
        async with served(api, used) as connect:
            watching = asyncio.ensure_future(watch(watched_files(api.context, used), outcomes))
            counts, is_over = {"complete": 0, "begun": 0}, False
            serials: dict[int, float] = {}  # and when each was first seen

            async def stream_on() -> None:
                while not is_over:
                    reader, writer = await connect(trust)
                    serials.setdefault(serial_of(writer), time.monotonic())
                    for _ in range(3):
                        counts["begun"] += 1
                        writer.write(body)
                        await asyncio.wait_for(reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n"), 20)
                        counts["complete"] += 1
                        await asyncio.sleep(0.02)
                    writer.close()

            clients = [asyncio.ensure_future(stream_on()) for _ in range(4)]
            delays = []
            while counts["complete"] < len(clients):
                await asyncio.sleep(0.005)
            for number in range(5):
                if number == 2:
                    (tmp_path / "cert.pem").write_bytes(trustme.CA().issue_cert("x").cert_chain_pems[0].bytes())
                    while not outcomes["certificate", "refused"]:
                        await asyncio.sleep(0.01)
                seen = set(serials)
                write_pair(tmp_path, ca.issue_cert("127.0.0.1"))
                written = time.monotonic()
                while not set(serials) - seen:
                    assert time.monotonic() - written < 10
                    await asyncio.sleep(0.005)
                delays.append(serials[(set(serials) - seen).pop()] - written)
            is_over = True
            await asyncio.gather(*clients)
            watching.cancel()
            assert counts["complete"] == counts["begun"] > 24
            assert statistics.median(delays) < 1.0, delays
            assert outcomes["certificate", "ok"] == 5

    api.run(scenario())


def test_a_client_must_show_a_certificate_where_one_is_asked_for(
    make_api: MakeApi, tmp_path: Path, ca: trustme.CA
) -> None:
    """S24: --ssl-cert-reqs 2."""
    ca_file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(ca_file)
    options = write_pair(tmp_path, ca.issue_cert("127.0.0.1"))
    used = certified(**options, ssl_ca_certs=str(ca_file), ssl_cert_reqs=2)
    stranger, friend = trusting(ca), trusting(ca)
    trustme.CA().issue_cert("client").configure_cert(stranger)
    ca.issue_cert("client").configure_cert(friend)
    api = make_api()

    async def answered(connect: object, context: ssl.SSLContext) -> int:
        try:
            reader, writer = await connect(context)  # type: ignore[operator]
            writer.write(GET)
            return (await response_of(reader))[0]
        except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
            return 0

    async def scenario() -> None:
        async with served(api, used) as connect:
            assert [await answered(connect, one) for one in (trusting(ca), stranger, friend)] == [0, 0, 200]

    api.run(scenario())


def test_plain_http_old_tls_and_stalled_handshakes_end_while_others_are_served(
    make_api: MakeApi, tmp_path: Path, ca: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F-58"""
    monkeypatch.setattr(process, "_HANDSHAKE_SECONDS", 0.3)
    used = certified(**write_pair(tmp_path, ca.issue_cert("127.0.0.1")))
    assert used.context.minimum_version == ssl.TLSVersion.TLSv1_2
    api = make_api()

    async def scenario() -> None:
        async with served(api, used) as connect:
            stalled = [await connect() for _ in range(50)]
            for _, writer in stalled[:25]:
                writer.write(b"\x16\x03\x01")
            plain_reader, plain_writer = await connect()
            plain_writer.write(GET)
            assert b"HTTP" not in await asyncio.wait_for(plain_reader.read(), 5)
            reader, writer = await connect(trusting(ca))
            writer.write(GET)
            assert (await response_of(reader))[0] == 200
            for one, _ in stalled:
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.wait_for(one.read(), 5) == b""

    api.run(scenario())


def test_refusals_arrive_through_tls_too(
    make_api: MakeApi, tmp_path: Path, ca: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedProtocol, "header_seconds", 0.2)
    used = certified(**write_pair(tmp_path, ca.issue_cert("127.0.0.1")))
    api = make_api()

    async def scenario() -> None:
        async with served(api, used) as connect:
            for sent, expected in (
                (b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000, (431, "headers_too_large")),
                (b"nonsense\r\n\r\n", (400, "invalid_http")),
                (b"GET /li", (408, "request_timeout")),
            ):
                reader, writer = await connect(trusting(ca))
                writer.write(sent)
                assert error_code(await response_of(reader)) == expected

    api.run(scenario())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ssl_certfile": "/no/such"}, "/no/such: No such file"),
        ({"ssl_keyfile": "k"}, "would not use TLS"),
        ({"ssl_certfile": "CERT", "ssl_keyfile": "OTHER"}, "KEY_VALUES_MISMATCH"),
        ({"ssl_certfile": "CERT"}, "PEM"),
        ({"ssl_certfile": "CERT", "ssl_keyfile": "KEY", "ssl_cert_reqs": 2}, "nobody may sign"),
        ({"ssl_certfile": "CERT", "ssl_keyfile": "KEY", "ssl_ciphers": "NOPE"}, "No cipher can be selected"),
        ({"ssl_certfile": "CERT", "ssl_keyfile": "KEY", "ssl_ca_certs": "/no/such"}, "No such file"),
    ],
)
def test_what_cannot_serve_ends_the_start(tmp_path: Path, ca: trustme.CA, options: dict[str, object], why: str) -> None:
    pair = write_pair(tmp_path, ca.issue_cert("127.0.0.1"))
    (tmp_path / "other.pem").write_bytes(ca.issue_cert("x").private_key_pem.bytes())
    paths = {"CERT": pair["ssl_certfile"], "KEY": pair["ssl_keyfile"], "OTHER": str(tmp_path / "other.pem")}
    given = {name: paths.get(str(value), value) for name, value in options.items()}
    with pytest.raises(StartupError) as caught:
        certificate(ServerConfig(**given))  # type: ignore[arg-type]
    assert caught.value.failure.code == "HS-E041"
    assert why in caught.value.failure.why


def test_without_a_certificate_there_is_no_tls() -> None:
    assert certificate(ServerConfig()) is None
