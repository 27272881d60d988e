"""Typed wrappers of the kernels: they allocate outputs and name shapes; everything else is checked in cpp/ops/ops.cpp.

Tensors cross by DLPack, so a kernel runs on the tensor's device; nothing here asks which one that is. A decode step
makes some ten calls a layer, hence the cheapest way to allocate: empty_like and new_empty(*sizes) take half the time of
torch.empty with keywords; and ``out``, for callers that give the same memory to every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _kernels


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's weight in the layout its device's kernel reads; made once, at load time."""

    data: Tensor
    n: int
    k: int


def pack_weight(weight: Tensor) -> PackedWeight:
    """weight: T [n, k], row-major."""
    n, k = weight.shape
    data = torch.empty(_kernels.packed_size(n, k), dtype=weight.dtype, device=weight.device)
    _kernels.pack_weight(data, weight)
    return PackedWeight(data, n, k)


def embedding(ids: Tensor, table: PackedWeight, picked: Tensor | None = None) -> Tensor:
    """ids: i32 [rows] -> T [rows, k]. A negative id, -(i + 1), stands for the id ``picked[i]``."""
    out = table.data.new_empty(ids.shape[0], table.k)
    _kernels.embedding(out, ids, table.data, picked, table.n)
    return out


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x: T [rows, k] -> [rows, n], of type T or, for logits, float32."""
    if out is None:
        out = x.new_empty(x.shape[0], weight.n) if dtype is None else x.new_empty((x.shape[0], weight.n), dtype=dtype)
    _kernels.linear(out, x, weight.data, bias, weight.n, weight.k)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: T [rows, dim] -> the same shape."""
    out = torch.empty_like(x)
    _kernels.rms_norm(out, x, weight, None, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """residual (T or f32) += x, in place; returns norm(residual), of type T."""
    if out is None:
        out = torch.empty_like(x)
    _kernels.rms_norm(out, x, weight, residual, eps)
    return out


def rotary(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """In place. q: T [rows, heads, dim], k: T [rows, kv_heads, dim], positions: i32 [rows]."""
    _kernels.rotary(q, k, cos_sin, positions)


def silu_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x: T [rows, 2 * dim] -> T [rows, dim]."""
    if out is None:
        out = x.new_empty(x.shape[0], x.shape[1] // 2)
    _kernels.silu_mul(out, x)
    return out


def store_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """k, v: T [rows, kv_heads, dim] into caches T [blocks, kv_heads, block_size, dim] at slots i64 [rows]."""
    _kernels.store_kv(k_cache, v_cache, k, v, slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    kv_start: Tensor,
    kv_blocks: Tensor,
    num_decodes: Tensor,
    max_decodes: int,
    max_prompts: int,
    max_query_len: int,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """q: T [rows, heads, dim] -> the same shape; see cpp/ops/ops.h for the ragged columns."""
    if out is None:
        out = torch.empty_like(q)
    _kernels.paged_attention(
        out,
        q,
        k_cache,
        v_cache,
        query_start,
        seq_lens,
        kv_start,
        kv_blocks,
        num_decodes,
        max_decodes,
        max_prompts,
        max_query_len,
        scale,
    )
    return out


def copy_blocks(cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """cache: [blocks, elements]; cache[dst[i]] = cache[src[i]]."""
    _kernels.copy_blocks(cache, src, dst)
