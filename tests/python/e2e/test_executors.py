"""S14: --distributed-executor-backend of a real server: the same tokens from each, and a box for what is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tiny_models import make_tiny_model

from .server import Server, command, serving

CLASS = """
from pathlib import Path
from hybrid_serve.engine.executor import load_inline

class Mine:
    def __init__(self, config, report):
        self._inner = load_inline(config, report)
        self.depth = self._inner.depth
        self.allocate, self.bind = self._inner.allocate, self._inner.bind

    def allocate(self): ...
    def bind(self, arenas, layout): ...

    def submit(self, batch):
        Path(__file__).with_name("used").touch()
        return self._inner.submit(batch)

    def preparation(self):
        return self._inner.preparation()

class WithoutSubmit(Mine):
    submit = None

class WithoutDepth(Mine):
    def __init__(self, config, report): ...
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("executors")
    (found / "my_executors.py").write_text(CLASS)
    make_tiny_model(found / "model")
    return found


def replies(server: Server) -> list[Any]:
    body = {
        "prompt": ["the bat", "to be or not to be", "a"],
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 2,
    }
    response = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return [(choice["token_ids"], choice["logprobs"]) for choice in response.json()["choices"]]


def test_every_executor_gives_the_same_greedy_tokens(folder: Path) -> None:
    found = {}
    for name in ("uni", "mp", "my_executors.Mine"):
        options = (str(folder / "model"), "--distributed-executor-backend", name, "--cpu-threads", "1")
        with serving(*options, env={"PYTHONPATH": path_with(folder)}) as server:
            found[name] = replies(server)
            workers = [p for p in server.tree() if p.cmdline()[:1] == ["hybrid-serve: worker of engine 0"]]
            assert len(workers) == (name == "mp")
        assert (folder / "used").exists() == (name == "my_executors.Mine")
    assert [len(ids) for ids, _ in found["uni"]] == [24] * 3
    assert found["mp"] == found["uni"]
    assert found["my_executors.Mine"] == found["uni"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.Class", "ModuleNotFoundError"),
        ("mpp", "uni, mp, ray, or package.module.Class"),
        ("json.loads", "it is no class but a function"),
        ("my_executors.WithoutSubmit", "it has no submit"),
        ("my_executors.WithoutDepth", "its depth is None"),
    ],
)
def test_what_is_no_executor_ends_the_start_with_exit_code_2(folder: Path, name: str, words: str) -> None:
    done = subprocess.run(
        command("serve", str(folder / "model"), "--port", "0", "--distributed-executor-backend", name),
        env={**os.environ, "PYTHONPATH": path_with(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    box = "\n".join(done.stderr.splitlines()[-5:])
    assert f"HS-E048  the executor {name} cannot be used" in box
    assert words in box


def path_with(folder: Path) -> str:
    return ":".join([str(folder), *(path for path in sys.path if path)])
