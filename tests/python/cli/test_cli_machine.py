"""``doctor`` and ``ps``: what they say of this machine and of servers that really run."""

from __future__ import annotations

import json
import os
import resource
import socket
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from e2e.server import free_port, serving
from hybrid_serve.cli import collect_env, doctor
from hybrid_serve.cli import ps as ps_module
from hybrid_serve.cli.doctor import Check
from hybrid_serve.cli.main import main
from hybrid_serve.launch.run_directory import RunDirectory, alive
from tiny_models import make_tiny_model

SECRET = "canary-5e1f9"


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, Any]]:
    return collect_env.facts()


def checked(facts: dict[str, dict[str, Any]], port: int | None = None) -> dict[str, Check]:
    return {check.name: check for check in doctor.examine(facts, free_port() if port is None else port)}


def altered(facts: dict[str, dict[str, Any]], section: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {**facts, section: {**facts[section], **values}}


def test_a_machine_that_runs_these_tests_has_no_failure(facts: dict[str, dict[str, Any]]) -> None:
    checks = checked(facts)
    assert len(checks) >= 14
    assert [check for check in checks.values() if check.level == "fail"] == []
    assert all(bool(check.fix) == (check.level != "ok") for check in checks.values())


@pytest.mark.parametrize(
    ("section", "values", "name", "level", "words"),
    [
        ("hybrid-serve", {"kernels": "not usable: signal 4"}, "kernels", "fail", "not usable: signal 4"),
        ("cpu", {"usable_cores": 8, "cgroup_cpu_max": "150000 100000"}, "cores", "warn", "allows the time of 1.5"),
        ("cpu", {"usable_cores": 8, "cgroup_cpu_max": "max 100000"}, "cores", "ok", "8 usable"),
        ("gpu", {"devices": ["H100, 81559 MiB"]}, "gpu", "warn", "this build has no CUDA kernels"),
        ("packages", {"msgspec": None}, "packages", "fail", "not installed: msgspec"),
    ],
)
def test_a_fault_is_found_and_has_a_fix(
    facts: dict[str, dict[str, Any]], section: str, values: dict[str, Any], name: str, level: str, words: str
) -> None:
    check = checked(altered(altered(facts, "hybrid-serve", cuda_kernels=False), section, **values))[name]
    assert (check.level, words in check.found) == (level, True), check


def test_packages_below_their_least_version_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, dict[str, Any]]
) -> None:
    version = metadata.version("msgspec")
    monkeypatch.setattr(metadata, "requires", lambda _: [f"msgspec>={version}.0", "pyyaml>=5", 'zzz>=9; extra == "x"'])
    assert checked(facts)["packages"].level == "ok"
    monkeypatch.setattr(metadata, "requires", lambda _: ["msgspec>=99.1", "torch"])
    check = checked(facts)["packages"]
    assert (check.level, check.found) == ("fail", f"too old: msgspec {version}, needs 99.1")


def test_a_busy_port_names_who_has_it(facts: dict[str, dict[str, Any]]) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        check = checked(facts, busy.getsockname()[1])["port"]
    assert check.level == "warn"
    assert f"pid {os.getpid()}" in check.found


def test_few_descriptors_are_warned_of(facts: dict[str, dict[str, Any]]) -> None:
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, old[1]))
    try:
        check = checked(facts)["open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    assert (check.level, "ulimit -n" in check.fix) == ("warn", True)


def test_a_variable_that_no_start_would_take_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], facts: dict[str, dict[str, Any]]
) -> None:
    monkeypatch.setattr(collect_env, "facts", lambda: facts)
    monkeypatch.setenv("HYBRID_SERVE_PORT", "many")
    assert main(["doctor", "--json"]) == 1
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert "HYBRID_SERVE_PORT: 'many'" in found["variables"]["found"]
    monkeypatch.setenv("HYBRID_SERVE_PORT", "1")
    monkeypatch.setenv("HYBRID_SERVE_PROT", "1")
    assert main(["doctor", "--port", str(free_port())]) == 0
    assert "did you mean PORT?" in capsys.readouterr().out


def test_a_bundle_has_what_a_report_needs_and_no_secret(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    facts: dict[str, dict[str, Any]],
) -> None:
    monkeypatch.setattr(collect_env, "facts", lambda: facts)
    for name in ("HYBRID_SERVE_API_KEY", "HF_TOKEN", "CUDA_SECRET_THING", "MY_PASSWORD"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    monkeypatch.setenv("HYBRID_SERVE_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("UNRELATED", "private")
    log = tmp_path / "server.log"
    log.write_text("".join(f"line {i}\n" for i in range(900)) + f"key {SECRET}-HYBRID_SERVE_API_KEY, Bearer abc\n")
    bundle = tmp_path / "report.zip"
    assert main(["doctor", "--bundle", str(bundle), "--log", str(log), "--port", str(free_port())]) == 0
    with zipfile.ZipFile(bundle) as opened:
        files = {name: opened.read(name).decode() for name in opened.namelist()}
    assert set(files) == {"doctor.txt", "collect-env.json", "config.json", "environment.json", "log.txt"}
    assert not any(SECRET in text or "private" in text or "Bearer abc" in text for text in files.values())
    assert json.loads(files["environment.json"])["HF_TOKEN"] == "***"
    assert json.loads(files["config.json"])["max_num_seqs"]["origin"] == "HYBRID_SERVE_MAX_NUM_SEQS"
    assert len(files["log.txt"].splitlines()) == 500
    capsys.readouterr()
    assert main(["doctor", "--bundle", str(tmp_path / "no" / "such.zip"), "--port", str(free_port())]) == 2
    assert main(["doctor", "--log", str(log)]) == 2


def test_a_run_directory_is_alive_as_long_as_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with RunDirectory() as path:
        assert path in alive()
        stale = tmp_path / "hybrid-serve-stale"
        stale.mkdir()
        (stale / "lock").touch()
        assert stale not in alive()
    assert path not in alive()


def test_ps_lists_a_server_that_runs_and_says_how_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    with serving(str(model), "--api-key", SECRET) as server:
        (mine,) = [one for one in ps_module.servers() if one["pid"] == server.process.pid]
        assert (mine["url"], mine["state"]) == (server.url, "ready")
        assert 0 < mine["seconds"] < 120
        assert mine["resident_bytes"] > 50 * 2**20
        assert str(model) in mine["command"]
        assert SECRET not in mine["command"]
        assert main(["ps"]) == 0
        assert f"{server.process.pid}  {server.url}" in capsys.readouterr().out
    assert server.process.pid not in [one["pid"] for one in ps_module.servers()]
    assert main(["ps", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)


def test_keys_are_masked_however_they_are_written() -> None:
    words = ["python", "x", "serve", "--api_key", "a", "b", "--port", "1", "--api-key=c", "m", "--admin-api-key", "d"]
    assert ps_module._shown(words) == "python x serve --api_key *** *** --port 1 --api-key=*** m --admin-api-key ***"
