"""What a server keeps of an engine that died, hangs or is asked about (P25, P2): with real processes."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

from hybrid_serve.cli.main import main
from server_process import ServerProcess, read_all

SLOW = "fake?delay=0.005"


def recordings(server: ServerProcess) -> list[Path]:
    return sorted(server.recordings.glob("hybrid-serve-flight-*.jsonl"))


def header(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes().splitlines()[0])
    return found


def is_written(server: ServerProcess, count: int) -> bool:
    return server.errors.count("hybrid-serve replay /") >= count


def test_an_engine_that_is_killed_leaves_its_last_steps_which_replay(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, SLOW) as server:
        server.wait_ready()
        stream = server.open_stream(max_tokens=60)
        server.child("engine").send_signal(signal.SIGKILL)
        assert len(read_all(stream)) == 61  # its tokens and its end: as if nothing had happened
        (path,) = recordings(server)
        assert re.search(rf"kept: hybrid-serve replay {path}", server.errors)
    assert "died" in header(path)["why"]
    assert any(line.startswith(b'["step"') for line in path.read_bytes().splitlines())
    assert main(["replay", str(path)]) == 0


def test_an_engine_that_raises_leaves_the_step_it_raised_in(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "fake?crash_at=5", supervision={"max_restarts": 0}) as server:
        server.wait_ready()
        server.open_stream(max_tokens=50)
        assert server.wait_exit() == 20
        (path,) = recordings(server)
        assert f"hybrid-serve replay {path} runs its last steps" in " ".join(server.errors.replace("│", " ").split())
    *_, last, _ = path.read_bytes().splitlines()
    assert last.startswith(b'["step",5,')  # scheduled, and never committed
    assert main(["replay", str(path)]) == 0


def test_an_engine_that_hangs_leaves_stacks_numbers_and_its_last_steps(tmp_path: Path) -> None:
    limits = {"engine_iteration_timeout": 1.0}
    with ServerProcess(tmp_path, "fake?slow_at=10&slow=60", supervision=limits) as server:
        server.wait_ready()
        server.open_stream(max_tokens=50)
        server.wait(lambda: recordings(server), 20)
        server.wait(lambda: "its last batch" in server.errors)
        errors = server.errors
        assert "in submit" in errors, "no stack"
        assert "its last batch: BatchHeader(step=10, num_seqs=1, num_tokens=1" in errors
        (path,) = recordings(server)
    assert "hung" in header(path)["why"]
    assert main(["replay", str(path)]) == 0


def test_a_server_that_is_asked_keeps_its_last_steps_and_goes_on(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, SLOW) as server:
        server.wait_ready()
        stream = server.open_stream(max_tokens=300)
        for count in range(1, 4):
            server.signal(signal.SIGUSR2)
            server.wait(lambda count=count: is_written(server, count))  # type: ignore[misc]
        assert len(read_all(stream)) == 301
        paths = recordings(server)
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
    assert len(paths) == 3
    for path in paths:
        assert header(path)["why"] == "asked for by signal"
        assert main(["replay", str(path)]) == 0


def test_a_folder_that_cannot_be_written_costs_the_recording_only(tmp_path: Path) -> None:
    supervision = {"flight_recorder_dir": str(tmp_path / "missing")}
    with ServerProcess(tmp_path, SLOW, supervision=supervision) as server:
        server.wait_ready()
        stream = server.open_stream(max_tokens=40)
        server.child("engine").send_signal(signal.SIGKILL)
        assert len(read_all(stream)) == 41
        assert "the last steps of engine 0 cannot be kept" in server.errors
