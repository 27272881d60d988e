"""The files of deploy/, as far as they can be checked without a container engine: what they name exists, and fits."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrid_serve.catalogue import FAULTS
from hybrid_serve.cli import options
from hybrid_serve.cli.settings import ENV_PREFIX, settings
from hybrid_serve.cli.usage import UsageError
from hybrid_serve.config import Config, ServerConfig
from hybrid_serve.launch.supervisor import DRAIN_GRACE
from hybrid_serve.server.app import POST_ROUTES
from hybrid_serve.server.openapi import openapi

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = sorted(file for file in DEPLOY.iterdir() if file.is_file())
TEXTS = {file.name: file.read_text() for file in FILES}
KEY = {"HYBRID_SERVE_API_KEY": "k"}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all(TEXTS[name]))


def of_kind(kind: str) -> Any:
    (found,) = [each for each in documents("kubernetes.yaml") if each["kind"] == kind]
    return found


def container() -> Any:
    (only,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    return only


def unit() -> dict[str, list[str]]:
    """Key -> values of the systemd unit."""
    found: dict[str, list[str]] = {}
    for line in TEXTS["hybrid-serve.service"].splitlines():
        if line and not line.startswith(("#", "[")):
            key, equals, value = line.partition("=")
            assert equals, line
            found.setdefault(key, []).append(value)
    return found


def stages() -> dict[str, list[str]]:
    """Stage of the Dockerfile -> its instructions, continued lines joined."""
    found: dict[str, list[str]] = {}
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXTS["Dockerfile"], flags=re.MULTILINE))
    for line in filter(None, text.splitlines()):
        word = line.split()[0]
        assert word in {"ARG", "FROM", "RUN", "COPY", "ENV", "USER", "VOLUME", "EXPOSE"} | {
            "WORKDIR",
            "HEALTHCHECK",
            "ENTRYPOINT",
            "CMD",
        }, line
        if word == "FROM":
            name = re.fullmatch(r"FROM \$\{\w+\} AS ([\w-]+)", line)
            assert name, line
            found[name[1]] = []
        elif found:
            found[list(found)[-1]].append(line)
    return found


def exec_form(stage: str, instruction: str) -> list[str]:
    (line,) = [line for line in stages()[stage] if line.startswith(instruction + " ")]
    return [str(word) for word in yaml.safe_load(line.partition(" ")[2])]


def image_environment(stage: str) -> dict[str, str]:
    words = [word for line in stages()[stage] if line.startswith("ENV ") for word in shlex.split(line)[1:]]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def serve_commands() -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(file, words after `serve`, environment) of every server that is started."""
    for stage in ("cpu", "cuda"):
        assert exec_form(stage, "ENTRYPOINT") == ["hybrid-serve"]
        yield f"Dockerfile {stage}", exec_form(stage, "CMD"), {**image_environment(stage), **KEY}
    for name, service in documents("compose.yaml")[0]["services"].items():
        given = {
            key: "k" if value is None or "$" in str(value) else value for key, value in service["environment"].items()
        }
        yield f"compose {name}", service["command"], {**image_environment(service["build"]["target"]), **given}
    given = {each["name"]: each.get("value", "k") for each in container()["env"]}
    yield "kubernetes", container()["args"], {**image_environment("cpu"), **given}
    words = shlex.split(unit()["ExecStart"][0])[1:]
    assert words[-2:] == ["--config", "/etc/hybrid-serve/config.yaml"]
    yield "systemd", [*words[:-1], str(DEPLOY / "config.yaml")], {}


COMMANDS = list(serve_commands())


@pytest.mark.parametrize(("words", "environment"), [each[1:] for each in COMMANDS], ids=[each[0] for each in COMMANDS])
def test_every_command_is_one_that_serve_takes(words: list[str], environment: dict[str, str]) -> None:
    assert words[0] == "serve"
    assert options.parse([str(word) for word in words[1:]], environment)
    assert options.stray_variables(environment) == []


def test_a_container_that_is_open_to_others_does_not_start_without_a_key() -> None:
    environment = {name: value for name, value in image_environment("cpu").items() if name.startswith(ENV_PREFIX)}
    with pytest.raises(UsageError, match="is open to other machines"):
        options.parse([], environment)


def test_every_option_that_is_named_anywhere_exists() -> None:
    known = {setting.variable for setting in settings()}
    flags = {setting.flag for setting in settings()} | {"--config", "--help"}
    for name, text in TEXTS.items():
        assert set(re.findall(rf"\b{ENV_PREFIX}[A-Z_]+", text)) <= known, name
        assert set(re.findall(r"(?<=[ `\[])--(?:max|shutdown|api|kv|config|host)[a-z-]*", text)) <= flags, name


def test_probes_ask_routes_that_exist_and_need_no_key() -> None:
    described = openapi(POST_ROUTES)["paths"]
    probes = [container()[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    paths = [probe["httpGet"]["path"] for probe in probes]
    health = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w*)", TEXTS["Dockerfile"])
    assert {port for port, _ in health} == {str(Config().server.port)}
    for path in (*paths, *(path for _, path in health)):
        assert described[path]["get"]["security"] == []
    assert paths == ["/ready", "/live", "/ready"]


def test_ports_are_the_one_that_serve_binds() -> None:
    port = Config().server.port
    (only,) = container()["ports"]
    assert only["containerPort"] == port
    assert of_kind("Service")["spec"]["ports"][0]["targetPort"] == only["name"]
    assert of_kind("Service")["spec"]["selector"].items() <= of_kind("Deployment")["metadata"]["labels"].items()
    for service in documents("compose.yaml")[0]["services"].values():
        assert [each.split(":")[-1] for each in service["ports"]] == [str(port)]


def test_whoever_stops_a_server_gives_it_the_time_to_drain() -> None:
    needed = ServerConfig().shutdown_timeout + DRAIN_GRACE
    assert of_kind("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed
    assert float(unit()["TimeoutStopSec"][0]) > needed
    for service in documents("compose.yaml")[0]["services"].values():
        assert float(service["stop_grace_period"].removesuffix("s")) > needed


def test_a_start_that_cannot_succeed_is_not_tried_again() -> None:
    hopeless = {fault.exit_code for fault in FAULTS.values() if 0 < fault.exit_code < 20}
    assert {int(code) for code in unit()["RestartPreventExitStatus"][0].split()} == hopeless


def test_stages_and_images_that_are_named_exist() -> None:
    made = stages()
    copied = re.findall(r"COPY --from=(\S+)", TEXTS["Dockerfile"])
    assert set(copied) == {"build-cpu", "build-cuda"}
    assert set(copied) <= set(made)
    services = documents("compose.yaml")[0]["services"]
    assert {service["build"]["target"] for service in services.values()} == {"cpu", "cuda"}
    assert container()["image"] in {service["image"] for service in services.values()}
    assert (DEPLOY.parent / ".ci" / "constraints-cpu.txt").exists()
    claim = of_kind("PersistentVolumeClaim")["metadata"]["name"]
    volumes = of_kind("Deployment")["spec"]["template"]["spec"]["volumes"]
    assert claim in [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in volumes]
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in volumes}


def test_systemd_knows_every_key_of_the_unit() -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not installed")
    done = subprocess.run([program, "verify", str(DEPLOY / "hybrid-serve.service")], capture_output=True, text=True)
    problems = [line for line in done.stderr.splitlines() if "hybrid-serve.service" in line]
    assert [line for line in problems if "is not executable" not in line] == []  # it is not installed here


def test_no_server_runs_as_root() -> None:
    user = of_kind("Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert all(f"USER {user}" in stages()[stage] for stage in ("cpu", "cuda"))
    assert unit()["DynamicUser"] == ["yes"]
