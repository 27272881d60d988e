"""``collect-env`` (S6): always exit 0, always valid JSON, whatever is missing."""

from __future__ import annotations

import json
import os
import signal
from importlib import metadata
from pathlib import Path

import pytest

from hybrid_serve import __version__, _kernels
from hybrid_serve.cli import collect_env as module
from hybrid_serve.cli.main import main


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def collected(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main(["collect-env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_json_tells_the_machine_and_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    found = collected(capsys)
    assert found["hybrid-serve"]["version"] == __version__
    assert bool(found["hybrid-serve"]["cuda_kernels"]) is _kernels.has_cuda()
    assert found["cpu"]["cores"] == os.cpu_count()
    assert isinstance(found["memory"]["total_bytes"], int)
    assert found["memory"]["total_bytes"] > 2**20
    assert found["gpu"] == {"devices": [], "topology": [], "nvcc": None}
    assert found["packages"]["torch"] == metadata.version("torch")


def test_text_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env"]) == 0
    text = capsys.readouterr().out
    for section in ("hybrid-serve", "system", "cpu", "memory", "gpu", "packages"):
        assert f"\n{section}\n" in "\n" + text
    assert "devices              none" in text


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ImportError('libstdc++ is too old')", "not usable: ImportError: libstdc++ is too old"),
        (
            f"import os, signal; os.kill(os.getpid(), {signal.SIGILL:d})",
            f"not usable: importing them ends the process with signal {signal.SIGILL:d}",
        ),
        ("raise SystemExit(3)", "not usable: no message"),
    ],
)
def test_kernels_that_cannot_be_imported_are_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str, message: str
) -> None:
    monkeypatch.setattr(module, "_ASK_KERNELS", code)
    assert collected(capsys)["hybrid-serve"]["kernels"] == message


def test_kernels_that_hang_are_said_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_ASK_KERNELS", "import signal; signal.pause()")
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    assert "timed out" in str(collected(capsys)["hybrid-serve"]["kernels"])


def test_usable_kernels_tell_their_instruction_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """S6: and what they were compiled for."""
    monkeypatch.setattr(module, "_ASK_KERNELS", "print('avx2', 4, '80-real 90a-real')")
    build = collected(capsys)["hybrid-serve"]
    assert (build["kernels"], build["cpu_kernels"], build["cpu_threads"]) == ("usable", "avx2", 4)
    assert build["cuda_kernels"] == ["80-real", "90a-real"]


def test_a_gpu_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = topo ] && exit 1\necho "H100, 81559 MiB, 580.1, 9.0"\necho\n')
    program.chmod(0o755)
    assert collected(capsys)["gpu"] == {"devices": ["H100, 81559 MiB, 580.1, 9.0"], "topology": [], "nvcc": None}


def test_the_packages_are_those_that_we_require(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    required = ["msgspec>=0.19", "no-such-package[x] >=2; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda _: required)
    packages = collected(capsys)["packages"]
    assert packages["msgspec"] == metadata.version("msgspec")
    assert packages["no-such-package"] is None
