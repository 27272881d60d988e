"""Decoder: the decoder-only transformer, once for all families. Knows layers and their order; not files."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.model_spec import ModelSpec
from ..layers.attention import Attention, AttentionScratch, CacheScales, HeadShape
from ..layers.batch import BatchView
from ..layers.linear import Linear
from ..layers.mlp import GatedMlp, MlpScratch
from ..layers.residual import NormedLinear, Residual
from ..layers.rotary import cos_sin_table
from . import family_of
from .family import Family
from .names import EMBEDDING, FINAL_NORM, LM_HEAD, PackedLinear, names_of_layer
from .weights import Weights, pack, vector

LOADING_THREADS = 4


class LayerScratch(NamedTuple):
    """Memory for one layer's intermediate results, reused by all layers of a step: it stays in the caches."""

    normed: Tensor
    attention: AttentionScratch
    mlp: MlpScratch


class DecoderLayer:
    """The residual stream through one layer. Norms fold in the addition before them, so each layer begins with the sum
    that the previous one left open; the first one's input, the embedding, is what the stream begins with."""

    def __init__(self, attention: Attention, mlp: GatedMlp) -> None:
        self.attention, self.mlp = attention, mlp

    def scratch(self, x: Tensor) -> LayerScratch:
        return LayerScratch(torch.empty_like(x), self.attention.scratch(x), self.mlp.scratch(x))

    def __call__(self, x: Tensor, residual: Residual, batch: BatchView, scratch: LayerScratch) -> Tensor:
        """``residual += x`` first; returns what is still to be added to ``residual``."""
        x = self.attention(x, residual, scratch.normed, batch, scratch.attention)
        return self.mlp(x, residual, scratch.normed, scratch.mlp)


class Decoder:
    def __init__(
        self,
        embedding: ops.PackedWeight,
        layers: list[DecoderLayer],
        lm_head: NormedLinear,
    ) -> None:
        self.embedding, self.layers, self.lm_head = embedding, layers, lm_head

    def bind_cache(self, cache: Tensor) -> None:
        """cache: T or fp8 [blocks, layers, 2, kv_heads, block_size, head_dim]; kept as views, one pair a layer."""
        for index, layer in enumerate(self.layers):
            layer.attention.bind_cache(cache[:, index, 0], cache[:, index, 1])

    def __call__(self, batch: BatchView) -> Tensor:
        """Logits, f32 [R, vocab], of the sampled rows; keys and values of all tokens go to the cache."""
        x = ops.embedding(batch.token_ids, self.embedding, batch.picked)
        residual, scratch = Residual(x), self.layers[0].scratch(x)
        for layer in self.layers:
            x = layer(x, residual, batch, scratch)
        if (rows := batch.sample_rows) is not None:
            x = x.index_select(0, rows)
            residual.select(rows)
        return self.lm_head(x, residual)


def build_decoder(
    spec: ModelSpec, weights: Weights, dtype: torch.dtype, max_positions: int, report: Callable[[float], None]
) -> Decoder:
    """Loads layer by layer, several at once; ``report`` gets the share done, from this thread."""
    family = family_of(spec)
    cos_sin = cos_sin_table(spec.rope, spec.head_dim, max_positions).to(weights.device)
    workers = min(LOADING_THREADS, len(os.sched_getaffinity(0)))
    layers: list[DecoderLayer] = []
    with ThreadPoolExecutor(workers) as pool:
        for layer in pool.map(
            lambda index: _build_layer(spec, family, weights, dtype, cos_sin, index), range(spec.num_layers)
        ):
            layers.append(layer)
            report(len(layers) / (spec.num_layers + 1))
    embedding = _table(weights, EMBEDDING, spec, dtype)
    lm_head = embedding if spec.tie_embeddings else _table(weights, LM_HEAD, spec, dtype)
    norm = vector(weights, FINAL_NORM, spec.hidden_size, dtype)
    report(1.0)
    return Decoder(embedding, layers, NormedLinear(norm, spec.rms_norm_eps, Linear(lm_head, dtype=torch.float32)))


def _build_layer(
    spec: ModelSpec, family: Family, weights: Weights, dtype: torch.dtype, cos_sin: Tensor, index: int
) -> DecoderLayer:
    names = names_of_layer(spec, family, index)
    qkv, output, gate_up, down = (Linear(*pack(weights, linear, dtype)) for linear in names.linears)
    q_norm = k_norm = None
    if family.head_norm:
        q_norm = vector(weights, names.q_norm, spec.head_dim, dtype)
        k_norm = vector(weights, names.k_norm, spec.head_dim, dtype)
    shape, eps = HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim), spec.rms_norm_eps
    scales = CacheScales(weights.scale(names.k_scale), weights.scale(names.v_scale))
    input_norm, mlp_norm = (
        vector(weights, name, spec.hidden_size, dtype) for name in (names.input_norm, names.mlp_norm)
    )
    return DecoderLayer(
        Attention(NormedLinear(input_norm, eps, qkv), output, shape, cos_sin, q_norm, k_norm, eps, scales),
        GatedMlp(NormedLinear(mlp_norm, eps, gate_up), down),
    )


def _table(weights: Weights, name: str, spec: ModelSpec, dtype: torch.dtype) -> ops.PackedWeight:
    part = PackedLinear(((name.removesuffix(".weight"), spec.vocab_size),), spec.hidden_size, bias=False)
    return pack(weights, part, dtype)[0]
