"""Finding a model: local paths, typos, what is never loaded, hub ids without a network (F-55, ADV-09, ADV-10)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled

from hybrid_serve.checkpoint.checkpoint import open_checkpoint
from hybrid_serve.checkpoint.hub import ResolvedModel, resolve
from hybrid_serve.config import ModelConfig
from hybrid_serve.errors import StartupError
from hybrid_serve.wire import StartupFailure
from tiny_models import make_tiny_model


def refused(model: Path | str, **settings: Any) -> StartupFailure:
    with pytest.raises(StartupError) as caught:
        resolve(ModelConfig(model=str(model), **settings))
    return caught.value.failure


def test_a_folder_with_safetensors_is_a_hugging_face_model(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    found = resolve(ModelConfig(model=str(folder)))
    assert found == ResolvedModel(folder, "hf")
    assert found.folder == folder


def test_a_gguf_file_or_a_folder_with_one_is_found(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    expected = ResolvedModel(tmp_path / "model.gguf", "gguf")
    assert resolve(ModelConfig(model=str(tmp_path))) == expected
    assert resolve(ModelConfig(model=str(tmp_path / "model.gguf"))) == expected
    assert expected.folder == tmp_path


def test_two_gguf_files_must_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    failure = refused(tmp_path)
    assert failure.exit_code == 10
    assert "a.gguf, b.gguf" in failure.why


def test_load_format_chooses_when_both_kinds_are_there(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert resolve(ModelConfig(model=str(folder))).kind == "hf"
    assert resolve(ModelConfig(model=str(folder), load_format="gguf")).kind == "gguf"
    (folder / "model.safetensors").unlink()
    assert resolve(ModelConfig(model=str(folder))).kind == "gguf"
    assert resolve(ModelConfig(model=str(folder), load_format="dummy")).kind == "hf"
    assert refused(folder, load_format="safetensors").exit_code == 10


def test_a_typo_in_a_path_suggests_the_nearest_name(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "SmolLM2-135M")
    failure = refused(tmp_path / "smollm2-135")
    assert (failure.code, failure.exit_code) == ("HS-E021", 10)
    assert str(tmp_path / "SmolLM2-135M") in failure.fix


def test_a_folder_with_pickles_only_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    failure = refused(folder)
    assert (failure.code, failure.exit_code) == ("HS-E023", 11)
    assert "convert" in failure.fix
    assert refused(folder / "pytorch_model.bin").exit_code == 11


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    failure = refused(tmp_path)
    assert failure.exit_code == 10
    assert "config.json" in failure.why
    assert refused("").exit_code == 10


def test_code_that_a_folder_brings_along_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = make_tiny_model(
        tmp_path / "m", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    )
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (folder / "tokenizer.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    open_checkpoint(resolve(ModelConfig(model=str(folder))))
    assert not canary.exists()
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["EvilForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError) as caught:
        open_checkpoint(resolve(ModelConfig(model=str(folder))))
    assert caught.value.failure.code == "HS-E023"
    assert not canary.exists()


def fake_download(monkeypatch: pytest.MonkeyPatch, outcome: Path | Exception) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **arguments: Any) -> str:
        calls.append({"repo": repo} | arguments)
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_is_downloaded_without_pickles_or_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_download(monkeypatch, make_tiny_model(tmp_path / "m"))
    found = resolve(ModelConfig(model="org/name", revision="v2", download_dir="/cache"))
    assert found.path == tmp_path / "m"
    assert calls[0]["repo"] == "org/name"
    assert (calls[0]["revision"], calls[0]["cache_dir"]) == ("v2", "/cache")
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in calls[0]["allow_patterns"])


def test_a_hub_id_that_is_not_cached_offline_suggests_one_that_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "models--Qwen--Qwen3-0.6B").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for error in (OfflineModeIsEnabled("offline"), LocalEntryNotFoundError("not found")):
        fake_download(monkeypatch, error)
        failure = refused("Qwen/Qwen3-06B")
        assert (failure.code, failure.exit_code) == ("HS-E021", 10)
        assert "Qwen/Qwen3-0.6B" in failure.fix


def test_offline_mode_of_the_hub_library_is_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failure = refused("org/name", download_dir=str(tmp_path))
    assert failure.exit_code == 10
    assert "offline" in failure.why


def test_other_failures_of_a_download_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = GatedRepoError.__new__(GatedRepoError)
    Exception.__init__(gated, "gated")
    fake_download(monkeypatch, gated)
    assert "HF_TOKEN" in refused("org/name").fix
    fake_download(monkeypatch, OSError(28, "No space left on device"))
    failure = refused("org/name")
    assert "No space left" in failure.why
    assert "disk" in failure.fix


def test_a_name_that_cannot_be_a_hub_id_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_download(monkeypatch, tmp_path)
    for name in ("./models/x", "a b", "/nowhere/at/all", "x/y/z", "x.gguf"):
        assert refused(name).exit_code == 10
    assert not calls
