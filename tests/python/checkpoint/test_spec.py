"""ModelSpec from config.json: spellings, defaults, and refusals that name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_serve.checkpoint import gguf_spec, hf_spec
from hybrid_serve.checkpoint.hf_spec import spec_of_folder
from hybrid_serve.checkpoint.model_spec import RopeSpec
from hybrid_serve.errors import StartupError
from hybrid_serve.models import FAMILIES as IMPLEMENTED
from tiny_models import FAMILIES, make_tiny_model


def spec(folder: Path, **overrides: Any) -> Any:
    return spec_of_folder(make_tiny_model(folder, overrides.pop("family", "llama"), **overrides))


def test_every_architecture_that_is_accepted_is_implemented() -> None:
    assert set(hf_spec.ARCHITECTURES.values()) == set(IMPLEMENTED)
    assert set(gguf_spec.ARCHITECTURES.values()) == set(IMPLEMENTED)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_follows_from_the_architecture(tmp_path: Path, family: str) -> None:
    found = spec(tmp_path, family=family)
    assert (found.family, found.num_layers, found.hidden_size, found.vocab_size) == (family, 2, 64, 512)


def test_both_spellings_of_rotary_scaling_mean_the_same(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    old = spec(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = spec(tmp_path, rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling})
    assert old.rope == new.rope == RopeSpec(5e5, "llama3", 8.0, 256, 1.0, 4.0)


def test_end_of_text_ids_come_from_both_files_without_repeats(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, eos_token_id=[2, 7])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert spec_of_folder(folder).eos_token_ids == (9, 2, 7)
    (folder / "generation_config.json").unlink()
    assert spec_of_folder(folder).eos_token_ids == (2, 7)


def test_a_sliding_window_counts_only_where_the_model_uses_it(tmp_path: Path) -> None:
    assert spec(tmp_path, family="mistral", sliding_window=128).sliding_window == 128
    assert spec(tmp_path, family="mistral", sliding_window=None).sliding_window == 0
    assert spec(tmp_path, family="qwen2", sliding_window=128, use_sliding_window=False).sliding_window == 0
    assert spec(tmp_path, family="qwen2", sliding_window=128, use_sliding_window=True).sliding_window == 128


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"architectures": ["FooForCausalLM"]}, "HS-E023"),
    "no architecture": ({"architectures": None}, "HS-E023"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "HS-E023"),
    "another activation": ({"hidden_act": "gelu"}, "HS-E023"),
    "unknown rotary scaling": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "HS-E023"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "HS-E023"),
    "hidden_size is a string": ({"hidden_size": "64"}, "HS-E022"),
    "no layers": ({"num_hidden_layers": 0}, "HS-E022"),
    "2^40 heads": ({"num_attention_heads": 2**40}, "HS-E022"),
    "uneven heads": ({"num_key_value_heads": 3}, "HS-E022"),
    "odd head": ({"head_dim": 15}, "HS-E022"),
    "epsilon 0": ({"rms_norm_eps": 0}, "HS-E022"),
    "tie is a number": ({"tie_word_embeddings": 1}, "HS-E022"),
    "scaling without factor": ({"rope_scaling": {"rope_type": "linear"}}, "HS-E022"),
    "scaling is a list": ({"rope_scaling": [1]}, "HS-E022"),
    "eos outside the vocabulary": ({"eos_token_id": 512}, "HS-E022"),
    "eos is text": ({"eos_token_id": "</s>"}, "HS-E022"),
    "unknown dtype": ({"torch_dtype": "int3"}, "HS-E022"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_config_that_cannot_work_is_one_startup_error(tmp_path: Path, name: str) -> None:
    changes, code = REFUSALS[name]
    folder = make_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError) as caught:
        spec_of_folder(folder)
    assert (caught.value.failure.code, caught.value.failure.exit_code) == (code, 11)
    if name == "unknown architecture":
        assert all(each in caught.value.failure.why for each in hf_spec.ARCHITECTURES)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="intermediate_size"):
        spec_of_folder(folder)
