"""Attention: norm, projections, rotary embedding, KV cache and attention of one layer; knows no other layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .batch import BatchView
from .linear import Linear
from .residual import NormedLinear, Residual


class HeadShape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int


class CacheScales(NamedTuple):
    """What an element of an fp8 cache stands for: so many times itself."""

    k: float = 1.0
    v: float = 1.0


NO_SCALES = CacheScales()


class AttentionScratch(NamedTuple):
    """Memory that every layer of a step writes its intermediate results to; q, k and v are views of qkv."""

    qkv: Tensor  # T [rows, (heads + 2 * kv_heads) * dim]
    q: Tensor  # T [rows, heads, dim]
    k: Tensor  # T [rows, kv_heads, dim]
    v: Tensor
    mixed: Tensor  # T [rows, heads, dim]
    mixed_rows: Tensor  # the same memory, T [rows, heads * dim]
    out: Tensor  # T [rows, hidden]


class Attention:
    def __init__(
        self,
        qkv: NormedLinear,
        output: Linear,
        shape: HeadShape,
        cos_sin: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
        scales: CacheScales = NO_SCALES,
    ) -> None:
        """``qkv`` yields q, k and v side by side; ``cos_sin`` is the table of ``layers.rotary``. q_norm, k_norm:
        weights, T [head_dim], of the RMS norms of each query and key head (Qwen3). ``scales``: of a cache in fp8, if it
        is."""
        self.qkv, self.output, self.shape, self.cos_sin = qkv, output, shape, cos_sin
        self.q_norm, self.k_norm, self.eps = q_norm, k_norm, eps
        self.scale = shape.head_dim**-0.5
        self._fp8_scales, self.scales = scales, NO_SCALES
        self.k_cache = self.v_cache = torch.empty(0)

    def bind_cache(self, k_cache: Tensor, v_cache: Tensor) -> None:
        """This layer's views of the cache, T or fp8 [blocks, kv_heads, block_size, head_dim]."""
        self.k_cache, self.v_cache = k_cache, v_cache
        self.scales = self._fp8_scales if k_cache.dtype == torch.float8_e4m3fn else NO_SCALES

    def scratch(self, x: Tensor) -> AttentionScratch:
        """For inputs of the shape of ``x``."""
        heads, kv_heads, dim = self.shape
        rows = x.shape[0]
        qkv = x.new_empty((rows, (heads + 2 * kv_heads) * dim))
        q, k, v = torch.split(qkv.view(rows, heads + 2 * kv_heads, dim), [heads, kv_heads, kv_heads], dim=1)
        mixed = x.new_empty((rows, heads, dim))
        return AttentionScratch(qkv, q, k, v, mixed, mixed.view(rows, heads * dim), x.new_empty(x.shape))

    def __call__(
        self, x: Tensor, residual: Residual, normed: Tensor, batch: BatchView, scratch: AttentionScratch
    ) -> Tensor:
        """Of ``residual += x``, T [rows, hidden] -> ``scratch.out``, to be added next. ``normed`` like x, memory."""
        self.qkv(x, residual, normed, scratch.qkv)
        ops.rotate_and_store(
            scratch.q,
            self.k_cache,
            self.v_cache,
            scratch.k,
            scratch.v,
            self.cos_sin,
            batch.positions,
            batch.slots,
            self.q_norm,
            self.k_norm,
            self.eps,
            *self.scales,
        )
        ops.paged_attention(
            scratch.q,
            self.k_cache,
            self.v_cache,
            batch.query_start,
            batch.seq_lens,
            batch.kv_start,
            batch.kv_blocks,
            batch.num_decodes,
            batch.max_decodes,
            batch.max_prompts,
            batch.max_query_len,
            self.scale,
            scratch.mixed,
            batch.plan,
            batch.prefixes is not None,
            *self.scales,
        )
        return self.output(scratch.mixed_rows, scratch.out)
