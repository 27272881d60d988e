"""Attention: projections, rotary embedding, KV cache and attention of one layer; knows no residual around it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .batch import BatchView
from .linear import Linear


class HeadShape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int


class HeadNorm(NamedTuple):
    """RMS norms of each query and key head (Qwen3). Weights: T [head_dim]."""

    q: Tensor
    k: Tensor
    eps: float


class Attention:
    def __init__(
        self, qkv: Linear, output: Linear, shape: HeadShape, cos_sin: Tensor, head_norm: HeadNorm | None = None
    ) -> None:
        """``qkv`` yields q, k and v side by side; ``cos_sin`` is the table of ``layers.rotary``."""
        self.qkv, self.output, self.shape, self.cos_sin, self.head_norm = qkv, output, shape, cos_sin, head_norm
        self.scale = shape.head_dim**-0.5
        self.k_cache = self.v_cache = torch.empty(0)

    def bind_cache(self, k_cache: Tensor, v_cache: Tensor) -> None:
        """This layer's views of the cache, T [blocks, kv_heads, block_size, head_dim]."""
        self.k_cache, self.v_cache = k_cache, v_cache

    def __call__(self, x: Tensor, batch: BatchView) -> Tensor:
        """x: T [rows, hidden] -> the same shape."""
        heads, kv_heads, dim = self.shape
        qkv = self.qkv(x)
        rows = qkv.shape[0]
        # Views with the row stride of qkv; one call each, cheaper than slicing and reshaping.
        stride = qkv.shape[1]
        q = qkv.as_strided((rows, heads, dim), (stride, dim, 1))
        k = qkv.as_strided((rows, kv_heads, dim), (stride, dim, 1), heads * dim)
        v = qkv.as_strided((rows, kv_heads, dim), (stride, dim, 1), (heads + kv_heads) * dim)
        if self.head_norm is not None:
            q = ops.rms_norm(q.reshape(rows * heads, dim), self.head_norm.q, self.head_norm.eps).view(rows, heads, dim)
            k = ops.rms_norm(k.reshape(rows * kv_heads, dim), self.head_norm.k, self.head_norm.eps)
            k = k.view(rows, kv_heads, dim)
        ops.rotary(q, k, self.cos_sin, batch.positions)
        ops.store_kv(self.k_cache, self.v_cache, k, v, batch.slots)
        mixed = ops.paged_attention(
            q,
            self.k_cache,
            self.v_cache,
            batch.query_start,
            batch.seq_lens,
            batch.kv_start,
            batch.kv_blocks,
            batch.num_decodes,
            batch.max_query_len,
            self.scale,
        )
        return self.output(mixed.view(rows, heads * dim))
