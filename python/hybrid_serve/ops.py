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


def linear_silu_mul(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    gate_up: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x: T [rows, k], weight: the gate's rows above as many of up's -> silu(gate) * up, T [rows, n / 2].

    ``gate_up``, T [rows, n], is memory for the product; what it holds afterwards is undefined.
    """
    rows = x.shape[0]
    if gate_up is None:
        gate_up = x.new_empty(rows, weight.n)
    if out is None:
        out = x.new_empty(rows, weight.n // 2)
    _kernels.linear_silu_mul(out, x, weight.data, bias, gate_up, weight.k)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: T [rows, dim] -> the same shape."""
    out = torch.empty_like(x)
    _kernels.rms_norm(out, x, weight, None, eps, False)
    return out


def norm_linear(
    x: Tensor,
    norm: Tensor,
    residual: Tensor,
    sum: Tensor,
    eps: float,
    weight: PackedWeight,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    gate_up: Tensor | None = None,
    normed: Tensor | None = None,
    out: Tensor | None = None,
    begins_residual: bool = False,
) -> Tensor:
    """sum = residual + x (= x with ``begins_residual``), T or f32 [rows, k], apart from ``residual``; then ``linear``
    of norm(sum) or, with ``gate_up``, ``linear_silu_mul``. ``normed``, T [rows, k], is memory: what it holds afterwards
    is undefined."""
    rows, n = x.shape[0], weight.n if gate_up is None else weight.n // 2
    if normed is None:
        normed = torch.empty_like(x)
    if out is None:
        out = x.new_empty(rows, n) if dtype is None else x.new_empty((rows, n), dtype=dtype)
    _kernels.norm_linear(
        out, x, norm, residual, sum, normed, weight.data, bias, gate_up, weight.n, weight.k, eps, begins_residual
    )
    return out


def silu_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x: T [rows, 2 * dim] -> T [rows, dim]."""
    if out is None:
        out = x.new_empty(x.shape[0], x.shape[1] // 2)
    _kernels.silu_mul(out, x)
    return out


def rotate_and_store(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """q: T [rows, heads, dim], normed (given weights T [dim]) and rotated in place for positions i32 [rows]. k, treated
    likewise, and v: T [rows, kv_heads, dim], only read, go to slots i64 [rows] of the caches, T [blocks, kv_heads,
    block_size, dim], or fp8 (E4M3), which keep so many scales."""
    _kernels.rotate_and_store(
        q, k_cache, v_cache, k, v, cos_sin, positions, slots, q_weight, k_weight, eps, k_scale, v_scale
    )


def plan_decode(
    query_start: Tensor,
    seq_lens: Tensor,
    kv_start: Tensor,
    num_decodes: Tensor,
    max_decodes: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    prefix_start: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    num_prefixes: Tensor | None = None,
    block_size: int = 0,
) -> Tensor:
    """What ``paged_attention`` of every layer needs to share out a step's decodes; called once a step, behind
    ``copy_blocks``. i32 [decode_plan_size(max_decodes)], undefined on a CPU, which needs none. ``prefix_start`` and so
    on: decodes that begin alike, see cpp/ops/ops.h."""
    plan = seq_lens.new_empty(_kernels.decode_plan_size(max_decodes))
    _kernels.plan_decode(
        plan,
        query_start,
        seq_lens,
        kv_start,
        num_decodes,
        max_decodes,
        heads,
        kv_heads,
        head_dim,
        prefix_start,
        prefix_lens,
        num_prefixes,
        block_size,
    )
    return plan


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
    plan: Tensor | None = None,
    shares_prefixes: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """q: T [rows, heads, dim] -> the same shape; see cpp/ops/ops.h for the ragged columns. ``plan``: ``plan_decode``'s,
    or None: the call makes its own. ``shares_prefixes``: whether that was told of some. ``k_scale``, ``v_scale``: as
    ``rotate_and_store`` was told."""
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
        plan,
        shares_prefixes,
        k_scale,
        v_scale,
    )
    return out


def copy_blocks(cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """cache: [blocks, elements]; cache[dst[i]] = cache[src[i]]."""
    _kernels.copy_blocks(cache, src, dst)


def swap_blocks(dst_cache: Tensor, src_cache: Tensor, dst: Tensor, src: Tensor) -> None:
    """dst_cache[dst[i]] = src_cache[src[i]]; caches: [blocks, elements], one on a device and one pinned on the host;
    dst, src: i32 or i64 [pairs] on the host."""
    _kernels.swap_blocks(dst_cache, src_cache, dst, src)
