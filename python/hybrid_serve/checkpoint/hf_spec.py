"""ModelSpec from a Hugging Face folder: config.json and generation_config.json, every key checked for its type.

Code that a folder brings along (auto_map) is never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .failures import corrupt, unsupported
from .model_spec import MAX_SIZE, ModelSpec, RopeKind, RopeSpec, checked
from .safetensors import read_json
from .tensors import FloatName

# The families that models/ implements, by the name in config.json.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ROPE_KINDS: dict[str, RopeKind] = {"default": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_DTYPES: dict[str, FloatName] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


def spec_of_folder(folder: Path) -> ModelSpec:
    """Raises StartupError: HS-E022 for a missing or senseless key, HS-E023 for a model that cannot be run."""
    path = folder / "config.json"
    fields = _Fields(path, read_json(path))
    family = _family_of(fields)
    if fields.values.get("quantization_config"):
        method = fields.table("quantization_config").values.get("quant_method", "?")
        raise unsupported(
            f"{path} describes weights quantised by {method!r}",
            "quantised safetensors cannot be read yet",
            "use the unquantised model, or a GGUF file of it",
        )
    activation = fields.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise unsupported(f"{path} asks for the activation {activation!r}", "only silu is there", "use another model")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    max_position = fields.size("max_position_embeddings", 2048)
    spec = ModelSpec(
        family=family,
        hidden_size=hidden,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", hidden // heads),
        intermediate_size=fields.size("intermediate_size"),
        vocab_size=fields.size("vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position=max_position,
        rope=_rope_of_folder(fields, max_position),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        sliding_window=_sliding_window(fields, family),
        eos_token_ids=_eos_of_folder(folder, fields),
        dtype=_dtype_of_folder(fields),
    )
    return checked(spec, path)


class _Fields:
    """Typed access to the keys of a config.json; every mistake names the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def wrong(self, key: str, expected: str) -> Exception:
        if self.values.get(key) is None:
            return corrupt(self.path, f"key {key!r} is missing", "use the model's own config.json")
        found = repr(self.values[key])[:80]
        return corrupt(self.path, f"key {key!r} is {found}, expected {expected}", "use the model's own config.json")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise self.wrong(key, f"an integer from 1 to {MAX_SIZE}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise self.wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def table(self, key: str) -> _Fields:
        value = self.values.get(key)
        if value is None:
            return _Fields(self.path, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return _Fields(self.path, value)


def _family_of(fields: _Fields) -> str:
    names = fields.values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise unsupported(
            f"the model's architecture is {name or 'not given in config.json'}",
            f"there is no implementation of it; there is one of {', '.join(ARCHITECTURES)}",
            "use a model of one of these architectures",
        )
    return ARCHITECTURES[name]


def _rope_of_folder(fields: _Fields, max_position: int) -> RopeSpec:
    # `rope_parameters` is the newer spelling, with the base inside; `rope_scaling` beside `rope_theta` the older.
    rope = fields.table("rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    name = rope.values.get("rope_type") or rope.values.get("type") or "default"
    kind = _ROPE_KINDS.get(name) if isinstance(name, str) else None
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if kind is None or partial != 1.0:
        raise unsupported(
            f"{fields.path} asks for rotary embeddings of type {name!r}, share {partial:g}",
            "default, linear, llama3 and yarn over the whole head are there",
            "use another model",
        )
    if kind == "default":
        return RopeSpec(theta=theta)
    attention_factor = rope.values.get("attention_factor")
    return RopeSpec(
        theta=theta,
        kind=kind,
        factor=rope.number("factor"),
        original_max_position=rope.size("original_max_position_embeddings", max_position),
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        attention_factor=None if attention_factor is None else rope.number("attention_factor"),
        mscale=rope.number("mscale", 0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
        truncate=rope.flag("truncate", True),
    )


def _sliding_window(fields: _Fields, family: str) -> int:
    if family.startswith("qwen") and not fields.flag("use_sliding_window"):
        return 0
    if family == "llama" or fields.values.get("sliding_window") is None:
        return 0
    return fields.size("sliding_window")


def _eos_of_folder(folder: Path, fields: _Fields) -> tuple[int, ...]:
    found: list[int] = []
    generation = folder / "generation_config.json"
    sources = [_Fields(generation, read_json(generation))] if generation.exists() else []
    for source in (*sources, fields):
        value = source.values.get("eos_token_id")
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            if type(each) is not int or not 0 <= each <= MAX_SIZE:
                raise source.wrong("eos_token_id", "a token id or a list of them")
            if each not in found:
                found.append(each)
    return tuple(found)


def _dtype_of_folder(fields: _Fields) -> FloatName:
    key = "dtype" if fields.values.get("dtype") else "torch_dtype"
    name = fields.values.get(key) or "bfloat16"
    if not isinstance(name, str) or name not in _DTYPES:
        raise fields.wrong(key, "float32, bfloat16 or float16")
    return _DTYPES[name]
