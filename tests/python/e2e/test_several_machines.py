"""The commands as one would type them on several machines; here all are this one (S9, S12)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tiny_models import make_tiny_model

from .server import Server, command, free_port, serving, wait_until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@contextmanager
def started(*args: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command that runs meanwhile, and its log."""
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(command(*args), stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process, Path(log.name)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def complete(server: Server, **headers: str) -> tuple[int, Any]:
    body = {"prompt": "what", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=60)
    return reply.status_code, reply.json()


def test_a_headless_engine_joins_answers_and_leaves(model: str, tmp_path: Path) -> None:
    """S9: ready when both have joined; the same text from either; SIGTERM ends it within 5 s; the head serves on."""
    keys, port = tmp_path / "dp.key", str(free_port())
    subprocess.run(command("keys", str(keys)), check=True, stdout=subprocess.DEVNULL)
    common = [model, "--data-parallel-rpc-port", port, "--data-parallel-key-file", str(keys)]
    common += ["--data-parallel-address", "127.0.0.1", "--max-model-len", "256"]
    node_args = ("serve", *common, "--headless", "--data-parallel-start-rank", "1")
    with started(*node_args) as (node, log):
        wait_until(lambda: "the head is asked at" in log.read_text(), "the node asks its head")
        with serving(*common, "--data-parallel-size", "2", "--data-parallel-size-local", "1") as head:
            assert httpx.get(head.url + "/ready").json()["engines"] == {"0": "ready", "1": "ready"}
            texts = [complete(head, **{"X-data-parallel-rank": rank})[1]["choices"][0]["text"] for rank in "01"]
            assert texts[0] == texts[1]
            listening = [
                one.laddr[0]
                for process in [*head.tree(), psutil.Process(node.pid), *psutil.Process(node.pid).children()]
                for one in process.net_connections("inet")
                if one.status == psutil.CONN_LISTEN
            ]
            assert set(listening) == {"127.0.0.1"}
            node.send_signal(signal.SIGTERM)
            assert node.wait(5) == 0
            wait_until(lambda: engines_of(head) == {"0": "ready", "1": "away"}, "the head knows")
            assert complete(head)[0] == 200
            status, answer = complete(head, **{"X-data-parallel-rank": "1"})
            assert (status, answer["error"]["code"]) == (503, "engine_restarting")
            assert "Engine 1" in answer["error"]["message"]


def engines_of(server: Server) -> dict[str, str]:
    found: dict[str, str] = httpx.get(server.url + "/ready", timeout=30).json()["engines"]
    return found


def test_each_rank_may_be_a_server_of_its_own(model: str) -> None:
    """External balancing: it says which rank it is, in its metrics and to who names another one."""
    options = ("--data-parallel-size", "2", "--data-parallel-rank", "1", "--data-parallel-external-lb")
    with serving(model, *options) as server:
        assert complete(server, **{"X-data-parallel-rank": "1"})[0] == 200
        status, answer = complete(server, **{"X-data-parallel-rank": "0"})
        assert status == 400
        assert "engine 1 only" in answer["error"]["message"]
        text = httpx.get(server.url + "/metrics").text
        assert set(re.findall(r'engine="(\d)"', text)) == {"1"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--headless"], "--data-parallel-key-file is needed"),
        (["--headless", "-asc", "2"], "means no API servers, api_server_count is 2"),
        (["--data-parallel-external-lb"], "--data-parallel-rank is needed"),
        (["-dp", "2", "--data-parallel-size-local", "4"], "is 2, but this machine has ranks [0, 1, 2, 3]"),
    ],
)
def test_what_makes_no_sense_exits_2_with_the_reason(model: str, words: list[str], says: str) -> None:
    done = subprocess.run(command("serve", model, *words), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_key_file_that_others_can_read_ends_the_start(model: str, tmp_path: Path) -> None:
    keys = tmp_path / "dp.key"
    subprocess.run(command("keys", str(keys)), check=True, stdout=subprocess.DEVNULL)
    os.chmod(keys, 0o644)
    words = ["--headless", "--data-parallel-key-file", str(keys)]
    done = subprocess.run(command("serve", model, *words), capture_output=True, text=True, timeout=60)
    assert done.returncode == 14
    assert "HS-E046" in done.stderr
