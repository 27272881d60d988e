"""A head and headless engines, real processes over TCP on loopback (S9, S10, F-09, ADV-02..04)."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from asking import OFTEN, ask, engines, refused, reply, status
from fake_executor import expected
from hybrid_serve.curve import make_key_file
from server_process import ServerProcess

MakeServer = Callable[..., ServerProcess]


class Pair:
    """A head with engine 0, and what it takes to start engine 1 elsewhere."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.keys = directory / "keys"
        make_key_file(self.keys)
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
            self.port = any_port.getsockname()[1]

    def head(self, model: str = "fake?delay=0.003", **options: Any) -> ServerProcess:
        parallel = {"data_parallel_size": 2, "data_parallel_size_local": 1} | self._common()
        return ServerProcess(self._folder("head"), model, parallel=parallel, **({"supervision": OFTEN} | options))

    def node(self, model: str = "fake?delay=0.003", name: str = "node", **parallel: Any) -> ServerProcess:
        parallel = {"headless": True, "data_parallel_start_rank": 1} | self._common() | parallel
        return ServerProcess(self._folder(name), model, parallel=parallel, supervision=OFTEN)

    def _common(self) -> dict[str, Any]:
        return {"data_parallel_rpc_port": self.port, "data_parallel_key_file": str(self.keys)}

    def _folder(self, name: str) -> Path:
        folder = self.directory / name
        folder.mkdir()
        return folder


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def phases(server: ServerProcess) -> list[str]:
    return [engine.phase for engine in engines(server)]


def listening(server: ServerProcess) -> set[tuple[str, int]]:
    server.remember_family()
    processes = [psutil.Process(server.process.pid), *server.family]
    found = [one for process in processes for one in process.net_connections("inet")]
    return {(one.laddr[0], one.laddr[1]) for one in found if one.status == psutil.CONN_LISTEN}


def test_the_head_is_ready_when_all_have_joined_and_serves_on_when_one_leaves_and_comes_back(pair: Pair) -> None:
    """S9, F-09: SIGTERM ends the node within 5 s, what it had goes on on the head's engine, token for token."""
    with pair.head(api_server_count=2) as head:
        head.wait(lambda: "is bound" in head.output)
        head.wait(lambda: phases(head) == ["ready", "away"])
        assert status(head).phase == "away"
        with pair.node() as node:
            node.wait_ready()
            head.wait_ready()
            assert "as engines [1] of the head" in node.output
            streams = [ask(head, [1, index], seed=2, max_tokens=500) for index in range(16)]
            head.wait(lambda: all(engine.running > 0 for engine in engines(head)))
            node.signal(signal.SIGTERM)
            assert node.wait_exit(5) == 0
            for index, stream in enumerate(streams):
                assert reply(stream).tokens() == expected([1, index], 2, 500)
            node.check_nothing_is_left()
            head.wait(lambda: phases(head) == ["ready", "away"])
            assert status(head).phase == "ready"
        with pair.node(name="again") as node:
            node.wait_ready()
            head.wait(lambda: phases(head) == ["ready", "ready"])
            streams = [ask(head, [1, index], seed=2, max_tokens=60) for index in range(8)]
            for index, stream in enumerate(streams):
                assert reply(stream).tokens() == expected([1, index], 2, 60)
            os.kill(head.child("engine", 0).pid, signal.SIGKILL)  # and the other way round
            assert reply(ask(head, [9], seed=2, max_tokens=60)).tokens() == expected([9], 2, 60)
            head.signal(signal.SIGTERM)
            assert head.wait_exit() == 0
            assert node.wait_exit() == 0  # the head tells it
            head.check_nothing_is_left()
            node.check_nothing_is_left()


def test_a_remote_engine_that_dies_is_restarted_by_its_node_and_one_whose_node_is_killed_is_away(pair: Pair) -> None:
    with pair.head() as head, pair.node() as node:
        head.wait_ready()
        node.wait_ready()
        streams = [ask(head, [1, index], seed=2, max_tokens=300) for index in range(8)]
        assert all(stream.recv(1, socket.MSG_PEEK) for stream in streams)
        os.kill(node.child("engine", 1).pid, signal.SIGKILL)
        for index, stream in enumerate(streams):
            assert reply(stream).tokens() == expected([1, index], 2, 300)
        head.wait(lambda: phases(head) == ["ready", "ready"])
        assert engines(head)[1].restarts == 1
        streams = [ask(head, [2, index], seed=2, max_tokens=300) for index in range(8)]
        assert all(stream.recv(1, socket.MSG_PEEK) for stream in streams)
        node.process.kill()
        for index, stream in enumerate(streams):
            assert reply(stream).tokens() == expected([2, index], 2, 300)
        head.wait(lambda: phases(head) == ["ready", "away"])
        node.check_nothing_is_left(may_leave_files=True)


def test_when_the_head_is_killed_the_node_ends_with_the_reason(pair: Pair) -> None:
    supervision = {"engine_heartbeat_timeout": 2.0}
    with pair.head(supervision=supervision) as head:
        parallel = {"headless": True, "data_parallel_start_rank": 1} | pair._common()
        folder = pair._folder("node")
        with ServerProcess(folder, "fake?delay=0.003", parallel=parallel, supervision=supervision) as node:
            head.wait_ready()
            node.wait_ready()
            head.process.kill()
            assert node.wait_exit() == 20
            assert "HS-E204" in node.errors
            node.check_nothing_is_left()


def test_every_listening_socket_is_on_loopback_and_strangers_change_nothing(pair: Pair) -> None:
    """ADV-02..04: garbage, a pickle, ZMQ without a key and with another one; the last is told apart and ends."""
    with pair.head() as head, pair.node() as node:
        head.wait_ready()
        node.wait_ready()
        open_ports = listening(head) | listening(node)
        assert {host for host, _ in open_ports} == {"127.0.0.1"}
        assert len(open_ports) == 3  # HTTP, the head's port for nodes, the engine's for API servers
        stream = ask(head, [1, 2], seed=3, max_tokens=400)
        assert stream.recv(1, socket.MSG_PEEK)
        engine_port = next(port for _, port in listening(node))
        for port in (pair.port, engine_port):
            attack(port)
        other = Pair(pair._folder("other"))
        other.port = pair.port
        with other.node() as stranger:
            assert stranger.wait_exit() == 14
            assert "HS-E046" in stranger.errors
        assert reply(stream).tokens() == expected([1, 2], 3, 400)
        # At either port 3 without any ceremony, and 4 with another key or none, which try again.
        head.wait(lambda: min(refused(head)[::2]) >= 7)
        assert refused(head)[1] == 0, "this engine listens to no network"
        assert phases(head) == ["ready", "ready"]
        assert [engine.restarts for engine in engines(head)] == [0, 0]


def attack(port: int) -> None:
    """Everything that a peer without our key can send."""
    import zmq

    pickled = b"cposix\nsystem\n(S'touch /tmp/never'\ntR."
    for raw in (os.urandom(4096), pickled, b"\xff" + b"\0" * 8 + b"\x7f\x03" + os.urandom(200)):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(raw)
    with zmq.Context() as context:
        public, secret = zmq.curve_keypair()
        for has_key in (False, True):
            for identity in (b"node-1-x", b"api-0"):
                dealer = context.socket(zmq.DEALER)
                dealer.setsockopt(zmq.IDENTITY, identity)
                dealer.setsockopt(zmq.LINGER, 0)
                if has_key:
                    dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = public, secret, public
                dealer.connect(f"tcp://127.0.0.1:{port}")
                dealer.send_multipart([b"\x21", pickled])
                assert not dealer.poll(100)  # nobody answers
                dealer.close()


@pytest.mark.parametrize(
    ("parallel", "model", "words"),
    [
        ({"data_parallel_start_rank": 5}, "fake?delay=0.003", "the head waits for [1]"),
        ({}, "fake?delay=0.004", "digest"),
    ],
)
def test_engines_of_another_place_or_model_are_refused_with_the_reason(
    pair: Pair, parallel: dict[str, Any], model: str, words: str
) -> None:
    """S10: exit code 20, in a moment; the head goes on waiting for the right ones."""
    with pair.head() as head:
        head.wait(lambda: "is bound" in head.output)
        with pair.node(model, **parallel) as node:
            assert node.wait_exit() == 20
            assert "HS-E204" in node.errors
            assert words in node.errors
        assert head.process.poll() is None
        assert "ready in" not in head.output
