"""A process that the system ends, or refuses memory: the log says so, with numbers and what to type (F-18)."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asking import OFTEN, ask, is_serving, reply
from fake_executor import expected
from hybrid_serve import control_group
from hybrid_serve.errors import lack_of_memory
from hybrid_serve.launch.local import Child
from hybrid_serve.launch.plan import ProcessSpec
from hybrid_serve.runner import memory
from server_process import ServerProcess
from tiny_models import make_tiny_model

MIB = 2**20
LIMIT = 400 * MIB


def files(root: Path, **texts: str) -> None:
    """In a name ``__`` stands for a slash and ``_dot_`` for a dot."""
    for name, text in texts.items():
        file = root / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_version_2_of_control_groups_is_read_from_the_own_group_outwards(tmp_path: Path) -> None:
    files(
        tmp_path,
        proc__self__cgroup="0::/outer/inner\n",
        proc__vmstat="pgfault 1\noom_kill 9\n",
        sys__fs__cgroup__outer__inner__memory_dot_max="max\n",
        sys__fs__cgroup__outer__inner__memory_dot_current=f"{100 * MIB}\n",
        sys__fs__cgroup__outer__inner__memory_dot_events="low 0\noom 3\noom_kill 2\n",
        sys__fs__cgroup__outer__memory_dot_max=f"{500 * MIB}\n",
        sys__fs__cgroup__outer__memory_dot_current=f"{200 * MIB}\n",
    )
    assert control_group.memory_limit(tmp_path) == 500 * MIB
    assert control_group.memory_left(tmp_path) == memory.free_bytes(tmp_path) == 300 * MIB
    assert control_group.oom_kills(tmp_path) == 2


def test_version_1_of_control_groups_is_read_too(tmp_path: Path) -> None:
    files(
        tmp_path,
        proc__self__cgroup="5:cpu:/\n4:memory:/job\n0::/\n",
        sys__fs__cgroup__memory__job__memory_dot_limit_in_bytes=f"{300 * MIB}\n",
        sys__fs__cgroup__memory__job__memory_dot_usage_in_bytes=f"{350 * MIB}\n",
        sys__fs__cgroup__memory__job__memory_dot_oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 7\n",
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes="9223372036854771712\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes="1\n",
    )
    assert control_group.memory_limit(tmp_path) == 300 * MIB
    assert control_group.memory_left(tmp_path) == 0
    assert control_group.oom_kills(tmp_path) == 7


def test_in_a_container_the_mounted_group_is_its_own_whatever_path_the_process_is_told(tmp_path: Path) -> None:
    files(
        tmp_path,
        proc__self__cgroup="0::/docker/0123\n",
        sys__fs__cgroup__memory_dot_max=f"{64 * MIB}\n",
        sys__fs__cgroup__memory_dot_current=f"{MIB}\n",
        sys__fs__cgroup__memory_dot_events="oom_kill 1\n",
    )
    assert (control_group.memory_limit(tmp_path), control_group.oom_kills(tmp_path)) == (64 * MIB, 1)


def test_where_the_group_does_not_count_the_machine_does_or_nobody(tmp_path: Path) -> None:
    assert control_group.oom_kills(tmp_path) is None
    assert (control_group.memory_limit(tmp_path), control_group.memory_left(tmp_path)) == (0, None)
    files(tmp_path, proc__vmstat="oom_kill 4\n", proc__self__cgroup="0::/\n", sys__fs__cgroup__memory_dot_max="text")
    assert control_group.oom_kills(tmp_path) == 4
    assert control_group.memory_limit(tmp_path) == 0


@pytest.mark.parametrize(("kills", "found"), [((5, 5), [False]), ((5, 6), [True, False]), ((5, 7), [True, True])])
def test_one_kill_of_the_system_explains_one_death(
    monkeypatch: pytest.MonkeyPatch, kills: tuple[int, int], found: list[bool]
) -> None:
    now = kills[0]
    monkeypatch.setattr("hybrid_serve.launch.local.oom_kills", lambda: now)
    monkeypatch.setattr(Child, "num_explained", 3)
    with subprocess.Popen(["true"]) as process, socket.socket() as life:
        children = [Child(ProcessSpec(role="engine", index=0, entry="", arguments={}), process, life) for _ in found]
    now = kills[1]
    assert [child.was_killed_for_memory() for child in children] == found


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with a limit of memory, of this test alone."""
    for base, limit in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        folder = Path(base) / f"hybrid-serve-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if not (folder / limit).exists():
                continue
            (folder / limit).write_text(str(LIMIT))
            yield folder
            return
        finally:
            end = time.monotonic() + 10
            while time.monotonic() < end:
                try:
                    folder.rmdir()
                    break
                except OSError:  # its last process is just ending
                    time.sleep(0.02)
    pytest.skip("no control group with a limit of memory can be made here: not root, or its file system is read-only")


def test_an_engine_that_the_system_kills_is_restarted_and_the_log_says_why(tmp_path: Path, group: Path) -> None:
    """F-18, F-01: the limit of a real control group; streams go on, token for token."""
    with ServerProcess(tmp_path, "fake?delay=0.002&hoard_at=40", supervision=OFTEN, group=group) as server:
        server.wait_ready()
        stream = ask(server, [1, 2], seed=3, max_tokens=60)
        assert reply(stream).tokens() == expected([1, 2], 3, 60)
        server.wait(lambda: is_serving(server, 1))
        (line,) = [line for line in server.errors.splitlines() if "it is started again" in line]
        found = re.search(
            r"killed by the system for lack of memory \(OOM\): it had (\d+) MiB, the control group may take 400 MiB; "
            r"it is started again",
            line,
        )
        assert found, line
        assert 100 < int(found[1]) <= 400
        assert "--kv-cache-memory-bytes 128MiB (it was 256 MiB), or a larger limit" in line


def test_a_kill_by_somebody_is_not_taken_for_one_of_the_system(tmp_path: Path) -> None:
    if control_group.oom_kills() is None:
        pytest.skip("this system does not count what it kills")
    with ServerProcess(tmp_path, supervision=OFTEN) as server:
        server.wait_ready()
        os.kill(server.child("engine").pid, signal.SIGKILL)
        server.wait(lambda: is_serving(server, 1))
        assert "killed by SIGKILL and not by the system for lack of memory, which it counts" in server.errors


@pytest.mark.parametrize("load", ["load", "load_in_worker"])
def test_an_engine_that_gets_no_memory_while_it_serves_ends_with_numbers_and_not_with_a_traceback(
    tmp_path: Path, load: str
) -> None:
    """F-18: a real limit of the address space."""
    model, supervision = f"fake?hoard_at=10&address_space={300 * MIB}", {"max_restarts": 0}
    with ServerProcess(tmp_path, model, load=f"fake_executor:{load}", supervision=supervision) as server:
        server.wait_ready(30)
        assert reply(ask(server, [1, 2], seed=3, max_tokens=60)).end == "error: engine_dead"
        assert server.wait_exit(30) == 20
        box = "\n".join(server.errors.splitlines()[-4:])
        assert "HS-E026" in box
        assert re.search(r"has too little memory: .*16\.0 MiB", box)
        assert re.search(r"its address space \(ulimit -v\) has \d+ [MK]iB left", box)
        assert "ulimit -v unlimited" in box
        assert load == "load_in_worker" or "--kv-cache-memory-bytes 128MiB (it was 256 MiB)" in box
        assert "Traceback" not in server.errors


def test_a_cache_that_the_address_space_has_no_room_for_is_refused_by_the_plan(tmp_path: Path) -> None:
    """F-18, P3: the plan knows ``ulimit -v``, and what it advises fits in the end."""
    code = """
import resource, sys
from pathlib import Path
from hybrid_serve.checkpoint.hub import resolve
from hybrid_serve.config import CacheConfig, Config, ModelConfig
from hybrid_serve.errors import StartupError
from hybrid_serve.runner.model_runner import ModelRunner
config = Config(model=ModelConfig(model=sys.argv[1]), cache=CacheConfig(kv_cache_memory_bytes=int(sys.argv[2])))
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    runner = ModelRunner.load(config, resolve(config.model), lambda phase, share: None)
    runner.allocate(runner.plan_memory().num_blocks)
    print("it runs")
except StartupError as error:
    print(error.failure.code, error.failure.why, "|", error.failure.fix)
"""
    model = str(make_tiny_model(tmp_path))

    def run(num_bytes: int) -> str:
        command = [sys.executable, "-c", code, model, str(num_bytes)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
        ).stdout

    said, advised = run(8 * 2**30), 0
    for _ in range(5):  # threads and libraries reserve of it on the way, too: the plan after that may advise less
        found = re.search(r"HS-E026 .*; (\d+) MiB are free.*\| --kv-cache-memory-bytes (\d+)MiB", said)
        assert found, said
        advised = int(found[2])
        assert advised <= int(found[1]) < 1024
        if (said := run(advised * MIB)) == "it runs\n":
            return
    raise AssertionError(said)


def test_an_error_of_another_kind_is_none_of_memory() -> None:
    assert lack_of_memory("engine 0", ValueError("n is 3")) is None
    torch_says = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes.")
    lack = lack_of_memory("engine 0", torch_says, 8 * MIB)
    assert lack is not None
    assert "the system gave it no 65536 MiB" in lack.failure.why
    assert lack.failure.fix.startswith("--kv-cache-memory-bytes 4MiB (it was 8 MiB)")
