"""The key of the engines' network: who can read it, who gets in (ADV-02..04)."""

from __future__ import annotations

from pathlib import Path
from socket import create_connection

import pytest
import zmq

from engine_harness import wait_until
from hybrid_serve.cli.main import main
from hybrid_serve.curve import Gate, Handshakes, Keys, make_key_file, read_key_file
from hybrid_serve.errors import StartupError
from hybrid_serve.sockets import bind_router, connect_dealer


def keys() -> Keys:
    public, secret = zmq.curve_keypair()
    return Keys(public.decode(), secret.decode())


def test_the_command_makes_a_file_for_this_user_alone_and_never_writes_over_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    assert main(["keys", str(path)]) == 0
    made = read_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    shown = capsys.readouterr().out
    assert made.secret not in shown
    assert made.public not in shown
    assert main(["keys", str(path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["keys", str(tmp_path / "no" / "keys")]) == 2
    assert read_key_file(path) == made


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (None, 0o600, "No such file"),
        (b"", 0o600, "does not hold a key pair"),
        (b'{"public": "x", "secret": "y"}', 0o600, "does not hold a key pair"),
        (b"cposix\nsystem\n(S'true'\ntR.", 0o600, "does not hold a key pair"),
        (b"", 0o640, "mode is 0640"),
        (b"", 0o604, "mode is 0604"),
    ],
)
def test_a_key_file_that_is_not_safe_or_not_one_is_refused(
    tmp_path: Path, content: bytes | None, mode: int, words: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(StartupError) as caught:
        read_key_file(path)
    assert (caught.value.failure.code, caught.value.failure.exit_code) == ("HS-E046", 14)
    assert words in caught.value.failure.why


def test_a_pair_of_two_different_keys_is_no_pair(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    make_key_file(path)
    other = path.read_bytes().replace(read_key_file(path).public.encode(), keys().public.encode())
    path.write_bytes(other)
    with pytest.raises(StartupError, match="key file"):
        read_key_file(path)


def test_only_who_has_the_key_is_heard_and_every_other_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """ADV-02. A client that knows our public key and has a pair of its own passes the handshake, not the gate; a pickle
    without any ceremony does not come so far."""
    monkeypatch.setattr("hybrid_serve.curve.HANDSHAKE_MS", 2000)
    ours, stranger = keys(), keys()
    server, client = zmq.Context(), zmq.Context()
    gate = Gate(server, ours)
    router = bind_router(server, "tcp://127.0.0.1:*", gate)
    address = router.getsockopt_string(zmq.LAST_ENDPOINT)
    curious = client.socket(zmq.DEALER)
    curious.curve_publickey, curious.curve_secretkey = stranger.public.encode(), stranger.secret.encode()
    curious.curve_serverkey = ours.public.encode()
    plain = client.socket(zmq.DEALER)
    for socket in (curious, plain):
        socket.linger = 0
        socket.connect(address)
        socket.send(b"never")
    with create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as raw:
        raw.sendall(b"cposix\nsystem\n(S'touch never'\ntR.")
        friend = connect_dealer(client, address, b"friend", ours)
        friend.send(b"hello")
        assert router.poll(5000)
        assert router.recv_multipart() == [b"friend", b"hello"]
        assert not router.poll(300)
    wait_until(lambda: gate.num_refused >= 3)
    client.destroy(linger=0)
    server.destroy(linger=0)


def test_a_connection_that_is_not_ours_counts_once_when_its_time_is_over() -> None:
    """ADV-02: neither does one of ours that comes and goes."""
    now = 0.0
    handshakes = Handshakes(lambda: now)
    for when, event in ((0, zmq.EVENT_ACCEPTED), (1, zmq.EVENT_ACCEPTED), (2, zmq.EVENT_HANDSHAKE_SUCCEEDED)):
        now = float(when)
        handshakes.saw(event)
    counts = []
    for when in (3, 7, 20):
        now = float(when)
        counts.append((handshakes.num_failed(), handshakes.is_undecided))
    assert counts == [(0, True), (1, False), (1, False)]
    handshakes.saw(zmq.EVENT_ACCEPTED)
    handshakes.saw(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    now = 40.0
    assert handshakes.num_failed() == 1


def test_nothing_is_bound_or_connected_to_a_network_without_keys() -> None:
    with zmq.Context() as context:
        with pytest.raises(ValueError, match="needs keys"):
            bind_router(context, "tcp://127.0.0.1:*")
        with pytest.raises(ValueError, match="needs keys"):
            connect_dealer(context, "tcp://127.0.0.1:1", b"x")


def test_a_context_ends_while_its_gate_waits() -> None:
    """F-03: a port that is busy, or a stop, is no reason to be aborted by the library."""
    pair = keys()
    for _ in range(200):
        context = zmq.Context()
        gate = Gate(context, pair)
        router = bind_router(context, "tcp://127.0.0.1:*", gate)
        context.destroy(linger=0)
        assert router.closed
