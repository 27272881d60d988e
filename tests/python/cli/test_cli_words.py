"""The commands about words: ``config explain``, ``translate``, ``completion``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hybrid_serve.cli import completion, options
from hybrid_serve.cli.main import COMMANDS, main
from hybrid_serve.cli.settings import settings
from hybrid_serve.cli.translate import translated
from hybrid_serve.cli.usage import UsageError
from hybrid_serve.cli.vllm_flags import INSTEAD, NOT_SUPPORTED, NOTES, SECRET_VARIABLES, VARIABLES


def test_config_explain_says_who_set_each_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """F-64's precedence, made visible."""
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\nmax_num_seqs: 2\nhost: ::1\n")
    monkeypatch.setenv("HYBRID_SERVE_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("HYBRID_SERVE_API_KEY", "canary-1")
    argv = ["config", "explain", "tiny", "--config", str(file), "--port", "4"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["port"] == {"value": "4", "origin": "--port", "default": "8000"}
    assert found["max_num_seqs"]["origin"] == "HYBRID_SERVE_MAX_NUM_SEQS"
    assert found["host"]["origin"] == f"{file}:3"
    assert found["model"]["origin"] == "MODEL"
    assert found["seed"]["origin"] == "default"
    assert set(found) == {setting.name for setting in settings()}
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "canary" not in shown
    assert "seed" not in shown
    assert main([*argv, "--all"]) == 0
    assert "\nseed " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["expalin"], "did you mean explain?"),
        ([], "expected explain"),
        (["explain", "--prot", "1"], "unknown option --prot"),
    ],
)
def test_config_refuses_what_serve_would(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(["config", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words", "left_out"),
    [
        (
            "vllm serve org/m --max_model_len 4096 --dtype bfloat16 --served-model-name a b --seed -1",
            "org/m --max-model-len 4096 --dtype bfloat16 --served-model-name a b --seed -1",
            [],
        ),
        (
            "CUDA_VISIBLE_DEVICES=0 /usr/bin/vllm serve m -tp 2 --port=9 --no-enable-prefix-caching",
            "m --port 9 --no-enable-prefix-caching",
            ["-tp 2: no counterpart"],
        ),
        (
            "python -m vllm.entrypoints.openai.api_server --model m --enable-chunked-prefill --compilation-config.x 3",
            "--model m",
            ["--enable-chunked-prefill: not needed: always on", "--compilation-config.x 3: no counterpart"],
        ),
        (
            "vllm serve m -dp 2 --distributed-executor-backend ray --no-enable-ssl-refresh",
            "m --data-parallel-size 2 --distributed-executor-backend ray --no-enable-ssl-refresh",
            [],
        ),
        (
            "vllm serve m --enable-log-outputs --enable-log-requests --no-enable-log-requests --uvicorn-log-level info",
            "m --log-requests full",
            [
                "--no-enable-log-requests: not needed: the default",
                "--uvicorn-log-level info: there is one --log-level for everything",
            ],
        ),
        (
            "vllm serve m --h11-max-header-count 256 --h11-max-incomplete-event-size 4194304",
            "m --max-headers 256 --max-header-bytes 4194304",
            [],
        ),
        (
            "llama-server --port 1 -m x.gguf -c 8192 -np 4 -ngl 99 --api-key k",
            "x.gguf --port 1 --max-model-len 8192 --max-num-seqs 4 --api-key k",
            ["-ngl 99: no counterpart"],
        ),
    ],
)
def test_commands_of_others_become_ours(command: str, words: str, left_out: list[str]) -> None:
    found = translated(command.split())
    assert (" ".join(found.words), found.left_out) == (words, left_out)
    assert options.parse(found.words, {})


def test_translate_prints_a_command_that_a_shell_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "vllm serve 'my model' --trust-remote-code --port 1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "hybrid-serve serve 'my model' --port 1\n"
    assert shown.err == "left out: --trust-remote-code: never: no code of a model folder is run\n"
    assert main(["translate", "X='a b' Y= vllm serve m"]) == 0
    assert capsys.readouterr().out == "X='a b' Y='' hybrid-serve serve m\n"
    assert main(["translate", "--", "vllm", "serve", "m", "--port", "x"]) == 2
    assert "--port: 'x' is not a whole number" in capsys.readouterr().err


def test_variables_before_the_command_become_ours_or_stay_or_are_named() -> None:
    """S19, S23: a key stays out of the list of processes."""
    command = "CUDA_VISIBLE_DEVICES=1 VLLM_API_KEY=k VLLM_HTTP_TIMEOUT_KEEP_ALIVE=5 VLLM_USE_V1=1 vllm serve m"
    found = translated(command.split())
    assert found.variables == ["CUDA_VISIBLE_DEVICES=1", "HYBRID_SERVE_API_KEY=k"]
    assert found.words == ["m", "--keep-alive-timeout", "5"]
    assert found.left_out == ["VLLM_USE_V1=1: no counterpart"]


def test_notes_are_about_flags_that_we_lack_and_name_what_we_have() -> None:
    known = {setting.flag for setting in settings()}
    assert set(NOTES) | set(INSTEAD) <= NOT_SUPPORTED
    assert {*VARIABLES.values(), *(words[0] for words in INSTEAD.values())} <= known
    assert set(SECRET_VARIABLES.values()) <= {setting.variable for setting in settings()}
    assert {flag for note in NOTES.values() for flag in re.findall(r"--[a-z-]+", note)} <= known


@pytest.mark.parametrize("command", ["ollama run x", "vllm chat", "x"])
def test_translate_refuses_what_it_does_not_know(command: str) -> None:
    with pytest.raises(UsageError, match="expected vllm serve"):
        translated(command.split())


def test_completion_knows_every_command_and_every_option() -> None:
    found = completion.flags()
    assert {name.split()[0] for name in found} == set(COMMANDS)
    assert {setting.flag for setting in settings()} <= set(found["serve"])
    assert "--max-inflight" in found["run-batch"]
    assert "--max-num-seqs" in found["run-batch"]
    assert {"--plot", "--max-concurrency"} <= set(found["bench sweep"])
    assert all(flag.startswith("--") for flags in found.values() for flag in flags)


def offered(script: Path, *words: str) -> set[str]:
    """What bash would offer for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _hybrid_serve; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "--norc", "-c", ask], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def test_bash_completes_commands_kinds_flags_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "c.bash"
    script.write_text(capsys.readouterr().out)
    assert offered(script, "hybrid-serve", "se") == {"serve"}
    assert offered(script, "hybrid-serve", "bench", "s") == {"serve", "sweep", "startup"}
    assert offered(script, "hybrid-serve", "serve", "--max-num-s") == {"--max-num-seqs"}
    assert offered(script, "hybrid-serve", "serve", "--dtype", "b") == {"bfloat16"}
    assert offered(script, "hybrid-serve", "bench", "sweep", "--pl") == {"--plot"}
    assert offered(script, "hybrid-serve", "serve", "fo") == set()  # bash's own completion of files follows


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells_are_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert "--max-num-seqs" in script.read_text() or "-l max-num-seqs" in script.read_text()
    assert script.read_text().count("'") % 2 == 0
    if shutil.which(shell):
        assert subprocess.run([shell, "-n", script], timeout=20).returncode == 0


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fsh"]) == 2
    assert "name a shell: bash, zsh, fish; did you mean fish" in capsys.readouterr().err
