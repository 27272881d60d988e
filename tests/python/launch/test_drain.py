"""SIGTERM under load, again and again: no stream is cut (F-12, S26). HYBRID_DRAIN_ROUNDS=50 is the goal's number."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest

from demo_model import demo_file
from server_process import ServerProcess

ROUNDS = int(os.environ.get("HYBRID_DRAIN_ROUNDS", "2"))
STREAMS, LIMIT = 8, 20.0


class Client(threading.Thread):
    """Asks for one stream after the other until it is refused; ``begun`` after the first event of the first one."""

    def __init__(self, port: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._port, self._dice = port, random.Random(seed)
        self.begun = threading.Event()
        self.num_complete = 0
        self.cut: list[str] = []
        self.end = ""

    def run(self) -> None:
        while not self.end:
            connection = HTTPConnection("127.0.0.1", self._port, timeout=60)
            try:
                self._stream(connection)
            except OSError:
                self.end = "no connection"  # the server is gone
            finally:
                connection.close()

    def _stream(self, connection: HTTPConnection) -> None:
        num_tokens = self._dice.randrange(5, 60)
        fields = {"prompt": [1, 2, 3], "max_tokens": num_tokens, "stream": True, "ignore_eos": True, "seed": 1}
        body = json.dumps(fields | {"return_token_ids": True})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        try:
            answer = connection.getresponse()
        except (OSError, HTTPException):
            self.end = "no answer"  # it was in the queue of the socket when the last process closed it
            return
        if answer.status != 200:
            error = json.loads(answer.read())["error"]["code"]
            if error == "model_loading":  # the other API server loads its tokenizer still
                time.sleep(0.05)
                return
            if error != "draining":
                self.cut.append(f"{answer.status} {error}")
            self.end = error
            return
        read = b""
        try:
            while piece := answer.read1(65536):
                read += piece
                self.begun.set()
        except (OSError, HTTPException) as error:
            self.cut.append(f"{type(error).__name__} after {read[-200:]!r}")
            return
        events = [json.loads(line[6:]) for line in read.split(b"\n") if line.startswith(b"data: {")]
        ids = [id for event in events for choice in event["choices"] for id in choice.get("token_ids", ())]
        if read.endswith(b"data: [DONE]\n\n") and len(ids) == num_tokens:
            self.num_complete += 1
        else:
            self.cut.append(f"{len(ids)} of {num_tokens} tokens, then {read[-200:]!r}")


def test_a_request_that_comes_while_the_model_loads_may_wait_for_it(tmp_path: Path) -> None:
    """P20: from the moment on when the port is bound."""
    with ServerProcess(
        tmp_path,
        "fake?load=1.5",
        api_entry="hybrid_serve.server.process:main",
        model_options={"tokenizer": str(demo_file())},
        queue_while_loading=True,
    ) as server:
        server.wait(lambda: "is bound" in server.output, 60)
        connection = HTTPConnection("127.0.0.1", server.address[1], timeout=60)
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 5})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["usage"]["completion_tokens"]) == (200, 5)
        connection.close()
        server.wait_ready(60)


def test_who_asks_whether_it_is_ready_is_never_refused_a_connection(tmp_path: Path) -> None:
    """P20: from the moment on when the port is bound, before there is an API server."""
    states: list[str] = []
    with ServerProcess(
        tmp_path,
        "fake?load=1.5",
        api_entry="hybrid_serve.server.process:main",
        model_options={"tokenizer": str(demo_file())},
    ) as server:
        server.wait(lambda: "is bound" in server.output, 60)
        status = 503
        while status == 503:
            connection = HTTPConnection("127.0.0.1", server.address[1], timeout=60)
            connection.request("GET", "/ready")
            answer = connection.getresponse()
            status, body = answer.status, json.loads(answer.read())
            assert {"state", "progress", "eta_s"} <= set(body)
            states += [body["state"]] if body["state"] not in states[-1:] else []
            connection.close()
        assert (status, states.pop()) == (200, "ready")
        assert states
        assert set(states) <= {"starting", "loading_weights", "allocating"}


@pytest.mark.parametrize("number", range(ROUNDS))
def test_sigterm_under_load_cuts_no_stream_and_the_exit_code_is_0(tmp_path: Path, number: int) -> None:
    dice = random.Random(number)
    options = {"tokenizer": str(demo_file()), "served_model_name": ("demo",)}
    with ServerProcess(
        tmp_path,
        "fake?delay=0.01",
        api_entry="hybrid_serve.server.process:main",
        model_options=options,
        api_server_count=2,
        shutdown_timeout=LIMIT,
    ) as server:
        server.wait_ready(60)
        clients = [Client(server.address[1], number * STREAMS + index) for index in range(STREAMS)]
        for client in clients:
            client.start()
        for client in clients:
            server.wait(lambda client=client: client.begun.is_set() or client.end, 60)  # type: ignore[misc]
        time.sleep(dice.uniform(0, 0.5))
        told = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait_exit(LIMIT + 10) == 0, server.errors
        seconds = time.monotonic() - told
        for client in clients:
            client.join(30)
        assert [cut for client in clients for cut in client.cut] == []
        assert sum(client.num_complete for client in clients) >= STREAMS
        assert {client.end for client in clients} <= {"draining", "no connection", "no answer"}
        assert seconds < LIMIT + 1
        server.check_nothing_is_left()
