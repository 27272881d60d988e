"""``fit`` (P3): the engine's own arithmetic, before any download of weights."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hybrid_serve import LLM
from hybrid_serve.checkpoint.checkpoint import open_checkpoint
from hybrid_serve.checkpoint.hub import resolve_metadata
from hybrid_serve.cli import options
from hybrid_serve.cli.main import main
from hybrid_serve.config import ModelConfig
from hybrid_serve.errors import StartupError
from hybrid_serve.runner.limits import plan_memory
from hybrid_serve.runner.sizes import CUDA, ModelSizes
from tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


def fitted(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert main(["fit", *argv, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_the_sizes_are_those_that_the_engine_finds(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fitted(capsys, str(model))
    llm = LLM(str(model), cpu_threads=1)
    facts = llm._executor._runner.facts
    assert found["weight_bytes"] == facts.weight_bytes
    assert found["kv_bytes_per_token"] * 16 == facts.block_bytes
    assert found["max_model_len"] == facts.max_model_len
    start = found["start"]
    assert start["kv_cache_bytes"] == llm._facts.num_blocks * facts.block_bytes
    assert start["max_model_len"] == llm._facts.max_model_len


def test_what_it_offers_a_start_takes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each row's flags, given to `fit` again as to a start, hold what the row says."""
    rows = fitted(capsys, str(model), "--memory", "20MiB")["choices"]
    assert rows
    for row in rows:
        start = fitted(capsys, str(model), "--memory", "20MiB", *row["flags"].split())["start"]
        assert start["requests_of_that_length"] >= row["requests"]
        assert start["max_model_len"] == row["context"]


def test_what_cannot_start_is_the_box_of_the_start(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """P3: exit 12 with the numbers and what to change."""
    assert main(["fit", str(model), "--memory", "200kB"]) == 12
    shown = capsys.readouterr()
    assert "HS-E026  the model does not fit in memory" in shown.err
    assert "weights" in shown.out
    assert main(["fit", str(model), "--memory", "2MiB", "--kv-cache-memory-bytes", "1GiB"]) == 12
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked",
    [["--kv-cache-memory-bytes", "1GiB"], ["--max-num-seqs", "9000"], ["--swap-space", "3", "--max-model-len", "500"]],
)
def test_with_each_change_of_a_refusal_it_fits(
    model: Path, capsys: pytest.CaptureFixture[str], asked: list[str]
) -> None:
    """P3."""
    assert main(["fit", str(model), "--memory", "16MiB", *asked]) == 12
    fixes = re.findall(r"^fix +(.*)$", capsys.readouterr().err, re.MULTILINE)[0].split(", or ")
    assert len(fixes) == 2
    for fix in fixes:
        fitted(capsys, str(model), "--memory", "16MiB", *asked, *fix.split())


def test_what_it_offers_a_gpus_start_takes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """P3: so many more requests than by default that their steps take what the cache would."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "Small, 800, 800"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = fitted(capsys, str(model))["gpus"][0]["choices"]
    assert any("--max-num-seqs" in row["flags"] for row in rows)
    for row in rows:
        config = options.parse([str(model), *row["flags"].split()], {}).config
        sizes = ModelSizes.of(config, open_checkpoint(resolve_metadata(config.model), with_tensors=False).spec)
        plan = plan_memory(config, sizes, CUDA, int(800 * 2**20 * 0.9))
        assert plan.num_blocks * config.cache.block_size >= row["requests"] * row["context"]
        assert plan.max_num_seqs >= row["requests"]


def test_where_the_memory_would_go_is_listed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """P3: the rows are of all the memory that is free."""
    start = fitted(capsys, str(model), "--memory", "20MiB")["start"]
    assert sum(start["memory"].values()) == 20 * 2**20
    assert (start["max_num_seqs"], start["max_num_batched_tokens"]) == (256, 512)
    assert main(["fit", str(model), "--memory", "20MiB"]) == 0
    assert "left free" in capsys.readouterr().out


def test_a_context_is_limited_and_said_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fitted(capsys, str(model), "--kv-cache-memory-bytes", "140KiB")
    assert found["start"]["max_model_len"] == 272
    assert "context limited to 272 of 512" in found["start"]["notes"][0]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--memory", "much"], 2, "--memory: 'much' is not a size"),
        (["/no/such/model"], 10, "HS-E021"),
        (["--max-model-len", "1000000"], 2, "HS-E024"),
        (["org/name/file.gguf"], 11, "HS-E023"),
    ],
)
def test_wrong_arguments_are_told(
    model: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, message: str
) -> None:
    words = [*argv, str(model)] if argv[0].startswith("--") else argv
    assert main(["fit", *words]) == code
    assert message in capsys.readouterr().err


def test_each_gpu_has_a_verdict(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """P3."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "H100, 8192, 4096"\necho "Tiny, 8192, 0"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["fit", str(model)]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("gpu 0    H100, 4.00 GiB free: context 512 x")
    assert second == "gpu 1    Tiny, 0.00 GiB free: does not fit; a start with these options needs --device cpu"


class Hub(BaseHTTPRequestHandler):
    """Enough of a model hub for one small file."""

    asked: list[str]
    config: bytes

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        self.asked.append(self.path)
        is_there = self.path == "/org/name/resolve/main/config.json"
        body = self.config if is_there else b"{}"
        self.send_response(200 if is_there else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"asked": [], "config": (model / "config.json").read_bytes()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_of_a_hub_id_only_the_configuration_is_downloaded(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fitted(capsys, "org/name", "--download-dir", str(tmp_path))
    assert found["weight_bytes"] > 0
    assert {path for path in hub.asked if "resolve" in path} == {"/org/name/resolve/main/config.json"}
    assert resolve_metadata(ModelConfig(model="org/name", download_dir=str(tmp_path))).path.is_dir()
    with pytest.raises(StartupError, match="HS-E021"):
        resolve_metadata(ModelConfig(model="org/other", download_dir=str(tmp_path)))
