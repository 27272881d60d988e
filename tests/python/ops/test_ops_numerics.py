"""The wrappers of ops.py against plain torch; the kernels' own corners are tested in C++ (tests/cpp/ops_*.cpp)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_serve import ops

FLOAT_TYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """To one rounding of `dtype` (half a unit in the last place), with some room for f32 sums."""
    relative = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1.1 * relative, atol=2e-5)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 960, 576), (16, 100, 77), (130, 64, 1536)])
def test_linear_is_torchs_linear(dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    x, weight, bias = (randn(*shape, dtype=dtype) for shape in [(rows, k), (n, k), (n,)])
    expected = functional.linear(x.double(), weight.double(), bias.double())
    packed = ops.pack_weight(weight / 8)
    logits = ops.linear(x, packed, dtype=torch.float32)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), (expected - bias.double()) / 8, rtol=1e-5, atol=1e-3)
    out = ops.linear(x, ops.pack_weight(weight), bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2**-8 if dtype != torch.float32 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_embedding_reads_the_rows_of_a_packed_table(dtype: torch.dtype) -> None:
    table, ids = randn(70, 50, dtype=dtype), torch.tensor([69, 0, 33, 33], dtype=torch.int32)
    assert torch.equal(ops.embedding(ids, ops.pack_weight(table)), table[ids])


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_rms_norm_is_torchs_rms_norm_also_on_a_slice(dtype: torch.dtype) -> None:
    x, weight = randn(5, 200, dtype=dtype)[:, 10:138], randn(128, dtype=dtype)
    out = ops.rms_norm(x, weight, 1e-5)
    assert out.is_contiguous()
    assert_close(out, functional.rms_norm(x.double(), (128,), weight.double(), 1e-5), dtype)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("sum_type", [torch.float32, None])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_norm_linear_adds_norms_and_multiplies(dtype: torch.dtype, sum_type: torch.dtype | None, begins: bool) -> None:
    x, residual = randn(3, 96, dtype=dtype), randn(4, 96, dtype=dtype)[1:].to(sum_type or dtype)
    norm, weight, bias = (randn(*shape, dtype=dtype) for shape in [(96,), (64, 96), (64,)])
    before, total = residual.clone(), torch.empty_like(residual)
    packed = ops.pack_weight(weight)
    out = ops.norm_linear(x, norm, residual, total, 1e-6, packed, bias, begins_residual=begins)
    assert torch.equal(residual, before)
    assert torch.equal(total, (x.float() + (0 if begins else residual.float())).to(total.dtype))
    normed = ops.rms_norm(total.to(dtype), norm, 1e-6)
    if total.dtype == dtype:
        assert torch.equal(out, ops.linear(normed, packed, bias))
    else:  # what is normed was not rounded
        exact = functional.rms_norm(total.double(), (96,), norm.double(), 1e-6)
        torch.testing.assert_close(
            out.double(), functional.linear(exact, weight.double(), bias.double()), rtol=0.03, atol=0.3
        )
    logits = ops.norm_linear(x, norm, residual, total, 1e-6, packed, dtype=torch.float32, begins_residual=begins)
    assert logits.dtype == torch.float32
    gated = ops.norm_linear(
        x, norm, residual, total, 1e-6, packed, bias, gate_up=torch.empty(3, 64, dtype=dtype), begins_residual=begins
    )
    assert torch.equal(gated, ops.silu_mul(out))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_rotate_and_store_turns_slices_of_qkv_and_fills_the_cache(dtype: torch.dtype, normed: bool) -> None:
    rows, heads, kv_heads, dim, block_size = 6, 9, 3, 64, 16
    qkv = randn(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    before = qkv.clone().view(rows, -1, dim)
    q, k, v = torch.split(qkv.view(rows, -1, dim), [heads, kv_heads, kv_heads], dim=1)
    angles = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).float().contiguous()
    positions = torch.tensor([0, 49, 7, 8, 9, 10], dtype=torch.int32)
    slots = torch.tensor([33, 2, -1, 40, 3, 15])
    caches = torch.zeros(2, 3, kv_heads, block_size, dim, dtype=dtype)
    weights = [randn(dim, dtype=dtype), randn(dim, dtype=dtype) + 1] if normed else [None, None]
    ops.rotate_and_store(q, caches[0], caches[1], k, v, cos_sin, positions, slots, weights[0], weights[1], eps=1e-5)

    def expected(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = functional.rms_norm(x.double(), (dim,), weight.double(), 1e-5).to(dtype)
        cos, sin = cos_sin[positions].double()[:, None].chunk(2, dim=-1)
        first, second = x.double().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    # A norm's last bit may go the other way, and then be turned.
    atol = 0.05 if normed and dtype != torch.float32 else 2e-5
    relative = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * 1.1
    q_before, k_before, v_before = torch.split(before, [heads, kv_heads, kv_heads], dim=1)
    torch.testing.assert_close(q.double(), expected(q_before, weights[0]), rtol=relative, atol=atol)
    assert torch.equal(k, k_before), "k and v are only read"
    assert torch.equal(v, v_before)
    stored = slots >= 0
    at = slots[stored] // block_size, slice(None), slots[stored] % block_size
    torch.testing.assert_close(caches[0][at].double(), expected(k_before, weights[1])[stored], rtol=relative, atol=atol)
    assert torch.equal(caches[1][at], v_before[stored])
    caches[:, at[0], :, at[2]] = 0
    assert not caches.any(), "something was written outside of the slots"


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_silu_mul_gates_the_second_half(dtype: torch.dtype) -> None:
    x = randn(7, 2 * 90, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert_close(ops.silu_mul(x), functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_linear_silu_mul_is_linear_then_silu_mul_in_given_or_new_memory(dtype: torch.dtype) -> None:
    x, weight, bias = (
        randn(6, 96, dtype=dtype),
        ops.pack_weight(randn(2 * 40, 96, dtype=dtype) / 8),
        randn(80, dtype=dtype),
    )
    for some_bias in (None, bias):
        expected = ops.silu_mul(ops.linear(x, weight, some_bias))
        assert torch.equal(ops.linear_silu_mul(x, weight, some_bias), expected)
        gate_up, out = torch.full((6, 80), torch.nan, dtype=dtype), torch.full((6, 40), torch.nan, dtype=dtype)
        assert ops.linear_silu_mul(x, weight, some_bias, gate_up, out) is out
        assert torch.equal(out, expected)


def test_no_rows_give_no_rows() -> None:
    packed = ops.pack_weight(torch.ones(4, 8))
    assert ops.linear(torch.empty(0, 8), packed).shape == (0, 4)
    assert ops.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert ops.silu_mul(torch.empty(0, 8)).shape == (0, 4)
    assert ops.embedding(torch.empty(0, dtype=torch.int32), packed).shape == (0, 8)
