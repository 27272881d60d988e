"""The decoder's tensors by their checkpoint names: the one list that loading, checking and dummy weights share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..checkpoint.model_spec import ModelSpec
from .family import Family

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


class PackedLinear(NamedTuple):
    """One Linear of ours: checkpoint matrices of equal width ``k``, stacked. ``parts``: (name, rows)."""

    parts: tuple[tuple[str, int], ...]
    k: int
    bias: bool


class LayerNames(NamedTuple):
    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    input_norm: str
    mlp_norm: str
    q_norm: str
    k_norm: str
    k_scale: tuple[str, ...]  # of an fp8 cache, by either name; few checkpoints have them
    v_scale: tuple[str, ...]

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        return self.qkv, self.output, self.gate_up, self.down


def names_of_layer(spec: ModelSpec, family: Family, index: int) -> LayerNames:
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = ((f"{attention}.q_proj", q_rows), (f"{attention}.k_proj", kv_rows), (f"{attention}.v_proj", kv_rows))
    gate_up = ((f"{mlp}.gate_proj", spec.intermediate_size), (f"{mlp}.up_proj", spec.intermediate_size))
    return LayerNames(
        qkv=PackedLinear(qkv, spec.hidden_size, family.qkv_bias),
        output=PackedLinear(((f"{attention}.o_proj", spec.hidden_size),), q_rows, family.output_bias),
        gate_up=PackedLinear(gate_up, spec.hidden_size, family.mlp_bias),
        down=PackedLinear(((f"{mlp}.down_proj", spec.hidden_size),), spec.intermediate_size, family.mlp_bias),
        input_norm=f"{prefix}.input_layernorm.weight",
        mlp_norm=f"{prefix}.post_attention_layernorm.weight",
        q_norm=f"{attention}.q_norm.weight",
        k_norm=f"{attention}.k_norm.weight",
        k_scale=(f"{attention}.k_scale", f"{attention}.k_proj.k_scale"),
        v_scale=(f"{attention}.v_scale", f"{attention}.v_proj.v_scale"),
    )


def expected_tensors(spec: ModelSpec, family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that the model needs."""
    yield EMBEDDING, (spec.vocab_size, spec.hidden_size)
    yield FINAL_NORM, (spec.hidden_size,)
    if not spec.tie_embeddings:
        yield LM_HEAD, (spec.vocab_size, spec.hidden_size)
    for index in range(spec.num_layers):
        names = names_of_layer(spec, family, index)
        for linear in names.linears:
            for name, rows in linear.parts:
                yield f"{name}.weight", (rows, linear.k)
                if linear.bias:
                    yield f"{name}.bias", (rows,)
        yield names.input_norm, (spec.hidden_size,)
        yield names.mlp_norm, (spec.hidden_size,)
        if family.head_norm:
            yield names.q_norm, (spec.head_dim,)
            yield names.k_norm, (spec.head_dim,)
