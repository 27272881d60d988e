"""Where Ray puts engines, what they are told, and how a cluster that cannot be used is refused (S13). No Ray here."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid_serve.cli.main import main
from hybrid_serve.cli.options import parse
from hybrid_serve.config import Config, EngineConfig, ModelConfig, ParallelConfig, ServerConfig
from hybrid_serve.curve import read_key_file
from hybrid_serve.errors import StartupError
from hybrid_serve.launch.handshake import refusal
from hybrid_serve.launch.nodes import Nodes
from hybrid_serve.launch.plan import Front, plan
from hybrid_serve.launch.ray import needs, node_config, node_spec, prepared
from hybrid_serve.problems import problems
from hybrid_serve.wire import PROTOCOL_VERSION, Hello, StartupFailure, Status

RAY = ParallelConfig(data_parallel_backend="ray", data_parallel_size=2)


def _free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


def config(count: int = 2, **engine: object) -> Config:
    parallel = replace(RAY, data_parallel_size=count)
    return Config(parallel=parallel, engine=replace(EngineConfig(), **engine))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "nodes", "share"),
    [
        (1, [{"CPU": 8.0}], 8),
        (2, [{"CPU": 8.0}], 4),
        (2, [{"CPU": 8.0}, {"CPU": 8.0}], 8),
        (2, [{"CPU": 8.0}, {"CPU": 3.0}], 4),  # both on the large one, rather than 3 each
        (3, [{"CPU": 8.0}, {"CPU": 8.0}], 4),
        (2, [{"CPU": 2.0}, {"CPU": 1.0}, {"memory": 1.0}], 1),
    ],
)
def test_engines_on_cpus_get_the_largest_equal_share_with_which_all_find_room(
    count: int, nodes: list[dict[str, float]], share: int
) -> None:
    assert needs(config(count), nodes) == {"num_cpus": share}


def test_threads_that_were_asked_for_are_the_share() -> None:
    assert needs(config(2, cpu_threads=3), [{"CPU": 8.0}]) == {"num_cpus": 3}
    with pytest.raises(StartupError, match=r"no room for 2 engines: its nodes have \[4\] CPUs"):
        needs(config(2, cpu_threads=3), [{"CPU": 4.0}])


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_an_engine_gets_a_gpu_where_there_are_some_and_more_engines_than_gpus_are_refused(device: str) -> None:
    """Nobody waits for a GPU that never comes, or runs on a CPU unseen."""
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}]
    assert needs(config(2, device=device), nodes) == {"num_gpus": 1, "num_cpus": 0}
    with pytest.raises(StartupError, match="its nodes have 2 GPUs") as raised:
        needs(config(3, device=device), nodes)
    assert raised.value.failure.exit_code == 2
    assert needs(config(2, device="cpu"), nodes) == {"num_cpus": 8}


def test_no_node_with_a_gpu_is_refused_where_one_is_demanded() -> None:
    with pytest.raises(StartupError, match="its nodes have 0 GPUs"):
        needs(config(1, device="cuda"), [{"CPU": 8.0}])


def test_the_plan_has_one_process_with_ray_and_no_engine_of_this_machine(tmp_path: Path) -> None:
    """S13: and API servers, which learn the addresses later."""
    both = config(2)
    specs = plan(both, tmp_path, Front(7, 8), [])
    assert [spec.role for spec in specs] == ["ray", "api"]
    assert specs[0].environment == {"RAY_AUTH_MODE": "token"}
    assert specs[1].arguments["data_addresses"] == [[0, ""], [1, ""]]
    hello = Hello("ray", 0, 1, PROTOCOL_VERSION, "0", "")
    failure = refusal(hello, b"api-0", specs, "")
    assert failure is not None
    assert "ray 0 is not one of this server's processes" in failure.why
    insecure = replace(both, parallel=replace(RAY, insecure_ray=True))
    assert plan(insecure, tmp_path, Front(7, 8), [])[0].environment == {}


def test_a_node_is_told_what_an_engine_needs_and_no_key_of_a_client() -> None:
    secret = ServerConfig(api_key=("sk-one",), admin_api_key=("sk-two",), log_level="debug")
    head = replace(config(2), server=secret, model=ModelConfig(model="m"))
    there = node_config(head, 1)
    assert b"sk-" not in there.to_json()
    assert there.server.log_level == "debug"
    assert list(there.parallel.local_ranks) == [1]
    assert there.parallel.remote_ranks == ()
    assert there.engine_digest() == head.engine_digest()
    arguments = node_spec(1, "load", 3).arguments
    assert arguments == {"load": "load", "num_cores": 3}


def test_a_head_gets_a_key_for_this_run_and_a_path_that_is_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    before = replace(config(2), model=ModelConfig(model="model"))
    after = prepared(before, tmp_path)
    assert read_key_file(Path(after.parallel.data_parallel_key_file)).public
    assert after.model.model == str(tmp_path / "model")
    assert after.model.served_model_name == ("model",)
    hub = replace(after, model=ModelConfig(model="somebody/model"))
    assert prepared(hub, tmp_path) == hub  # nor is a key that is given replaced


def test_without_ray_the_box_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """S13: exit code 2, before a model is looked at."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "nothing", "--port", "0", "--data-parallel-backend", "ray"]) == 2
    shown = capsys.readouterr().err
    assert "HS-E047" in shown
    assert "pip install 'hybrid-serve[ray]'" in shown


def test_both_flags_of_vllm_mean_the_same() -> None:
    for flag in ("--data-parallel-backend", "--distributed-executor-backend"):
        assert parse([flag, "ray"], {}).config.parallel.is_ray


@pytest.mark.parametrize(
    "options",
    [
        {"headless": True, "data_parallel_key_file": "x"},
        {"data_parallel_hybrid_lb": True},
        {"data_parallel_rank": 0},
        {"data_parallel_size_local": 1},
    ],
)
def test_ray_and_engines_that_are_placed_by_hand_are_a_contradiction(options: dict[str, object]) -> None:
    assert "data_parallel_backend" in dict(problems(Config(parallel=replace(RAY, **options))))  # type: ignore[arg-type]
    assert problems(Config(parallel=RAY)) == []


def test_engines_that_are_lost_are_awaited_until_all_are_given_up(tmp_path: Path) -> None:
    """F-11: requests wait for an engine that comes back; when none does the server ends."""
    both = prepared(replace(config(2), parallel=replace(RAY, data_parallel_rpc_port=_free_port())), tmp_path)
    nodes = Nodes(both)
    ends: list[StartupFailure | None] = []
    nodes.on_end = ends.append
    try:
        assert [status.phase for status in nodes.statuses] == ["starting", "starting"]
        nodes.given_up(Status("dead", message="it died often", engine=1))
        assert [status.phase for status in nodes.statuses] == ["starting", "dead"]
        assert ends == []
        nodes.given_up(Status("dead", message="it died often, too", engine=0))
    finally:
        nodes.close()
    (end,) = ends
    assert end is not None
    assert (end.exit_code, end.why) == (20, "it died often, too")
