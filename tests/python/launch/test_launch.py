"""The parts of a start that need no process: plan, handshake, run directory, listening socket, report."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hybrid_serve import __version__
from hybrid_serve.config import Config, EngineConfig, ModelConfig, ParallelConfig, ServerConfig
from hybrid_serve.errors import StartupError
from hybrid_serve.launch import listener
from hybrid_serve.launch.handshake import refusal
from hybrid_serve.launch.plan import Front, ProcessSpec, device_of, plan, threads_of_each
from hybrid_serve.launch.report import PlainReporter
from hybrid_serve.launch.run_directory import LONGEST_SOCKET_PATH, RunDirectory
from hybrid_serve.wire import PROTOCOL_VERSION, EngineFacts, Hello, Status, api_identity, engine_identity

RUN = Path("/run/x")


def test_a_server_is_an_engine_and_an_api_server_which_agree_on_addresses() -> None:
    engine, api = plan(Config(), RUN, Front(5, 7), [6])
    assert (engine.name, api.name) == ("engine 0", "api 0")
    assert engine.entry == "hybrid_serve.engine.process:main"
    assert api.entry == "hybrid_serve.server.process:main"
    assert engine.arguments["control_address"] == api.arguments["control_address"] == "ipc:///run/x/control"
    assert api.arguments["data_addresses"] == [[0, engine.arguments["data_address"]]]
    assert (engine.inherited_fds, api.inherited_fds) == ((6,), (5, 7))


def test_several_api_servers_share_the_socket_and_the_engine_knows_how_many() -> None:
    engine, *servers = plan(Config(server=ServerConfig(api_server_count=3)), RUN, Front(5, 7), [6])
    assert engine.arguments["num_clients"] == 3
    assert [spec.arguments["api_index"] for spec in servers] == [0, 1, 2]
    assert {spec.arguments["listen_fd"] for spec in servers} == {5}


def test_several_engines_share_the_cores_and_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """S12: every API server talks to every engine."""
    monkeypatch.setattr("hybrid_serve.launch.plan.usable_cores", lambda: 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    config = Config(parallel=ParallelConfig(data_parallel_size=3), server=ServerConfig(api_server_count=2))
    first, second, third, *servers = plan(config, RUN, Front(5, 9), [6, 7, 8])
    assert [spec.name for spec in (first, second, third)] == ["engine 0", "engine 1", "engine 2"]
    assert [spec.inherited_fds for spec in (first, second, third)] == [(6,), (7,), (8,)]
    addresses = [[index, f"ipc:///run/x/engine-{index}"] for index in range(3)]
    assert [spec.arguments["data_addresses"] for spec in servers] == [addresses, addresses]
    assert second.arguments["data_address"] == addresses[1][1]
    assert len({spec.arguments["stacks_path"] for spec in (first, second, third)}) == 3
    assert {spec.arguments["cpu_threads"] for spec in (first, second, third)} == {2}
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in (first, second, third)] == ["4", "GPU-5", "6"]


@pytest.mark.parametrize(
    ("place", "count", "visible", "expected"),
    [(0, 1, "3,4", {}), (1, 2, "", {"CUDA_VISIBLE_DEVICES": "1"}), (1, 2, "3", {"CUDA_VISIBLE_DEVICES": ""})],
)
def test_one_engine_sees_what_there_is_and_one_too_many_sees_no_gpu(
    place: int, count: int, visible: str, expected: dict[str, str]
) -> None:
    assert device_of(place, count, {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_threads_that_were_asked_for_are_those_of_each_engine() -> None:
    asked = Config(engine=EngineConfig(cpu_threads=3))
    assert [threads_of_each(asked, count, 8) for count in (1, 2)] == [3, 3]
    assert [threads_of_each(Config(), count, 8) for count in (1, 2, 3, 9)] == [0, 4, 2, 1]


def test_a_spec_survives_the_way_to_its_process() -> None:
    for spec in plan(Config(), RUN, Front(5, 7), [6]):
        assert msgspec.json.decode(msgspec.json.encode(spec), type=ProcessSpec) == spec


def hello(**changes: str | int) -> Hello:
    return msgspec.structs.replace(Hello("engine", 0, 1, PROTOCOL_VERSION, __version__, "digest"), **changes)


@pytest.mark.parametrize(
    ("message", "identity", "names"),
    [
        (hello(version="9.9.9"), engine_identity(0), ["9.9.9", __version__]),
        (hello(protocol=99), engine_identity(0), ["99", str(PROTOCOL_VERSION)]),
        (hello(config_digest="other"), engine_identity(0), ["other", "digest"]),
        (hello(index=1), engine_identity(1), ["engine 1"]),
        (hello(role="intruder"), b"intruder-0", ["intruder 0"]),
        (hello(), api_identity(0), ["engine 0"]),
    ],
)
def test_a_child_of_another_version_configuration_or_plan_is_refused(
    message: Hello, identity: bytes, names: list[str]
) -> None:
    """F-51: with both versions."""
    specs = plan(Config(), RUN, Front(5, 7), [6])
    failure = refusal(message, identity, specs, "digest")
    assert failure is not None
    assert all(name in failure.why for name in names)
    assert refusal(hello(), engine_identity(0), specs, "digest") is None


def test_the_run_directory_is_private_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with RunDirectory() as path:
        assert path.parent == tmp_path
        assert path.stat().st_mode & 0o777 == 0o700
        with RunDirectory() as other:  # a second server beside the first removes nothing of it
            assert other != path
        assert path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_stale_run_directories_go_and_live_or_foreign_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "hybrid-serve-stale").mkdir()
    (tmp_path / "hybrid-serve-stale" / "lock").touch()
    (tmp_path / "hybrid-serve-without-lock").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "lock").touch()
    (tmp_path / "hybrid-serve-link").symlink_to(tmp_path / "precious")
    with RunDirectory():
        pass
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"hybrid-serve-without-lock", "precious", "hybrid-serve-link"}
    assert (tmp_path / "precious" / "lock").exists()


def test_a_path_too_long_for_a_socket_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-56."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with RunDirectory() as path:
        assert len(str(path / "engine-00")) <= LONGEST_SOCKET_PATH
        with socket.socket(socket.AF_UNIX) as any_socket:
            any_socket.bind(str(path / "engine-00"))


def test_port_0_takes_any_free_one_and_says_which() -> None:
    with listener.listen(ServerConfig(port=0)) as bound:
        port = bound.getsockname()[1]
        assert listener.url(bound) == f"http://127.0.0.1:{port}"


def test_ipv6_is_bound_and_shown_in_brackets() -> None:
    try:
        with listener.listen(ServerConfig(host="::1", port=0)) as bound:
            assert listener.url(bound, "https") == f"https://[::1]:{bound.getsockname()[1]}"
    except StartupError as error:
        if "IPv6" in str(error) or not Path("/proc/net/if_inet6").exists() or "assign" in error.failure.why:
            pytest.skip(f"no IPv6 here: {error}")
        raise


def test_a_unix_socket_is_for_this_user_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listener.listen(ServerConfig(uds=str(path))) as bound:
        assert listener.url(bound) == f"http+unix://{path}"
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(StartupError) as caught, listener.listen(ServerConfig(uds=str(path))):
            pass
        assert (caught.value.failure.code, caught.value.failure.exit_code) == ("HS-E031", 13)
    assert not path.exists()


def test_a_dead_unix_socket_is_replaced_and_any_other_file_is_not(tmp_path: Path) -> None:
    """F-56."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with listener.listen(ServerConfig(uds=str(path))):
        pass
    path.write_text("precious")
    for bad, why in (
        (path, "another kind"),
        (tmp_path / ("x" * 120), "may have 107"),
        (tmp_path / "no" / "s", "No such"),
    ):
        with pytest.raises(StartupError) as caught, listener.listen(ServerConfig(uds=str(bad))):
            pass
        assert caught.value.failure.code == "HS-E032"
        assert why in caught.value.failure.why
    assert path.read_text() == "precious"


def test_a_port_in_use_names_the_process_and_another_port() -> None:
    """F-56: HS-E031, exit code 13."""
    with listener.listen(ServerConfig(port=0)) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(StartupError) as caught, listener.listen(ServerConfig(port=port)):
            pass
    failure = caught.value.failure
    assert (failure.code, failure.exit_code) == ("HS-E031", 13)
    assert f"pid {os.getpid()} (" in failure.why
    assert f"--port {port + 1}" in failure.fix


ORPHAN = """
import os, socket, sys, time
if os.fork():
    os._exit(0)
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    s.listen()
    print(os.getpid(), s.getsockname()[1], flush=True)
    sys.stdin.read()
"""


def test_the_holder_of_a_port_is_named_where_what_its_parent_has_is_not_to_be_seen() -> None:
    """F-56: an orphan's parent is the system's first process."""
    child = subprocess.Popen([sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        pid, port = map(int, child.stdout.readline().split())
        assert listener.port_holder(port).startswith(f"pid {pid} (")


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_that_is_not_of_this_machine_is_told_apart(host: str) -> None:
    """F-56."""
    with pytest.raises(StartupError) as caught, listener.listen(ServerConfig(host=host, port=0)):
        pass
    assert (caught.value.failure.code, caught.value.failure.exit_code) == ("HS-E032", 13)
    assert host in caught.value.failure.what


def test_the_report_of_a_start_has_its_phases_capacity_and_urls() -> None:
    text = io.StringIO()
    config = Config(model=ModelConfig(model="/models/tiny.gguf", served_model_name=("tiny",)))
    reporter = PlainReporter(config, text)
    reporter.bound("http://127.0.0.1:8000")
    for share in (0.0, 0.5, 1.0):
        reporter.status(Status("loading_weights", share))
    reporter.status(Status("allocating"))
    facts = EngineFacts(512, 1000, 16, 200, "bfloat16", "cpu (avx2)")
    reporter.status(Status("ready", 1.0, "context limited to 1000", facts=facts))
    reporter.ready()
    lines = text.getvalue().splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "3200 tokens = 3 requests of 1000" in lines[2]
    assert "context limited to 1000" in lines[3]
    assert "http://127.0.0.1:8000/v1" in text.getvalue()
    assert "model name: tiny" in text.getvalue()
    assert lines[-1].startswith("ready in ")
    assert "\r" not in text.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_share_is_redrawn_in_its_line() -> None:
    text = Terminal()
    reporter = PlainReporter(Config(), text)
    reporter.status(Status("loading_weights", 0.25))
    reporter.status(Status("loading_weights", 0.5))
    reporter.status(Status("allocating"))
    assert "\r[2/4] load      25%\r[2/4] load      50%\r\x1b[K[2/4] load" in text.getvalue()
