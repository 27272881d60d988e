"""The root command (S1): help, version, refusals, and what a command may import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hybrid_serve import __version__
from hybrid_serve.cli import main as main_module
from hybrid_serve.cli.main import COMMANDS, main


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hybrid_serve", *argv], capture_output=True, text=True, timeout=60)


def test_without_a_command_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == shown
    assert all(f"\n  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("flag", ["-v", "--version"])
def test_it_prints_its_version(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"), [("serv", "; did you mean serve?"), ("bogus", ""), ("--serve", "; did you mean serve?")]
)
def test_an_unknown_command_is_exit_2(capsys: pytest.CaptureFixture[str], word: str, hint: str) -> None:
    assert main([word]) == 2
    shown = capsys.readouterr()
    assert f"{word!r}{hint}\n" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    try:
        code = main([name, "--help"])
    except SystemExit as leave:  # argparse's own way out of --help
        code = leave.code if isinstance(leave.code, int) else 1
    assert code == 0
    assert f"hybrid-serve {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_an_unknown_flag(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name, "--no-such-flag"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert "no-such-flag" in shown[0]
    assert len(shown) == 2


def test_the_installed_command_and_the_module_are_the_same() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "forbidden"),
    [
        (["--help"], {"torch", "numpy", "starlette", "zmq", "msgspec", "yaml", "http.client", "asyncio"}),
        (["serve", "--help"], {"torch", "numpy", "starlette", "zmq", "yaml", "http.client", "asyncio"}),
        (["chat", "--help"], {"torch", "numpy", "starlette", "zmq", "yaml", "asyncio"}),
        (["explain", "HS-E031"], {"torch", "numpy", "starlette", "zmq", "msgspec", "yaml", "http.client", "asyncio"}),
        (["run-batch", "--help"], {"torch", "numpy", "starlette", "zmq", "yaml", "http.client"}),
        (["bench", "--help"], {"torch", "numpy", "starlette", "zmq", "msgspec", "yaml", "http.client", "asyncio"}),
        (["bench", "serve", "--help"], {"torch", "starlette", "zmq", "yaml", "matplotlib"}),
        (["bench", "throughput", "--help"], {"torch", "starlette", "zmq", "yaml"}),
        (["fit", "--help"], {"torch", "starlette", "zmq", "yaml", "huggingface_hub"}),
        (["doctor", "--help"], {"torch", "numpy", "starlette", "zmq", "yaml", "huggingface_hub"}),
        (["ps", "--help"], {"torch", "numpy", "starlette", "zmq", "yaml"}),
        (["translate", "vllm serve m"], {"torch", "numpy", "starlette", "zmq", "yaml", "http.client", "asyncio"}),
        (["completion", "bash"], {"torch", "starlette", "zmq", "yaml", "matplotlib"}),
        (["collect-env", "--help"], {"torch", "numpy", "starlette", "zmq", "yaml", "http.client"}),
    ],
)
def test_help_imports_next_to_nothing(argv: list[str], forbidden: set[str]) -> None:
    """S1: help under 200 ms; imports are what it would be spent on."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hybrid_serve", *argv], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hybrid_serve.cli.main" in imported
    assert imported & forbidden == set()


def test_a_reader_that_left_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run([sys.executable, "-m", "hybrid_serve"], stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 141
    assert done.stderr == b""


def test_an_interrupt_is_exit_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "_dispatch", interrupted)
    assert main(["chat"]) == 130
