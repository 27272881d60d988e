"""Stores, attention, copies and sampling through the binding: every column arrives where it belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_serve import _kernels, ops

FLOAT_TYPES = [torch.float32, torch.bfloat16, torch.float16]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def store(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Unturned: every row is at position 0."""
    cos_sin = torch.tensor([[1.0, 0.0]])
    positions = torch.zeros(k.shape[0], dtype=torch.int32)
    ops.rotate_and_store(torch.empty_like(k), k_cache, v_cache, k, v, cos_sin, positions, slots)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_attention_over_stored_keys_and_values_is_torchs_attention(dtype: torch.dtype) -> None:
    heads, kv_heads, dim, block_size = 6, 2, 64, 16
    generator = torch.Generator().manual_seed(0)
    caches = torch.zeros(2, 9, kv_heads, block_size, dim, dtype=dtype)
    # A decode of 1 query over 20 tokens and a prefill of 5 over 37, both with blocks out of order.
    lengths, queries, blocks = [20, 37], [1, 5], [[7, 2], [0, 8, 3]]
    keys, values, outs = [], [], []
    q = torch.randn(6, heads, dim, generator=generator).to(dtype)
    for length, table in zip(lengths, blocks, strict=True):
        k, v = (torch.randn(length, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
        slots = torch.tensor([table[i // block_size] * block_size + i % block_size for i in range(length)])
        store(caches[0], caches[1], k, v, slots)
        keys.append(k)
        values.append(v)
    for s, (k, v) in enumerate(zip(keys, values, strict=True)):
        rows = q[sum(queries[:s]) : sum(queries[: s + 1])]
        mask = torch.ones(queries[s], lengths[s], dtype=torch.bool).tril(lengths[s] - queries[s])
        outs.append(
            functional.scaled_dot_product_attention(
                rows.float().transpose(0, 1)[None],
                k.float().repeat_interleave(heads // kv_heads, 1).transpose(0, 1)[None],
                v.float().repeat_interleave(heads // kv_heads, 1).transpose(0, 1)[None],
                attn_mask=mask,
            )[0].transpose(0, 1)
        )
    out = ops.paged_attention(
        q,
        caches[0],
        caches[1],
        ints(0, 1, 6),
        ints(*lengths),
        ints(0, 2, 5),
        ints(7, 2, 0, 8, 3),
        torch.tensor([1]),
        1,
        1,
        5,
        dim**-0.5,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), torch.cat(outs), atol=tolerance, rtol=tolerance)


def test_attention_refuses_sequences_without_room_for_their_tokens() -> None:
    q, cache = torch.ones(1, 2, 64), torch.zeros(4, 2, 16, 64)
    with pytest.raises(ValueError, match="sequence 0 of 17 tokens has 1 blocks of 16"):
        ops.paged_attention(q, cache, cache, ints(0, 1), ints(17), ints(0, 1), ints(2), torch.tensor([1]), 1, 0, 1, 1.0)
    with pytest.raises(ValueError, match=r"kv_blocks holds 4, expected values in \[0, 4\)"):
        ops.paged_attention(q, cache, cache, ints(0, 1), ints(7), ints(0, 1), ints(4), torch.tensor([1]), 1, 0, 1, 1.0)


def test_attention_with_a_plan_is_attention_without_one() -> None:
    q, cache = torch.randn(2, 4, 64), torch.randn(3, 2, 16, 64)
    query_start, seq_lens, kv_start, one = ints(0, 1, 2), ints(20, 3), ints(0, 2, 3), torch.tensor([1])
    plan = ops.plan_decode(query_start, seq_lens, kv_start, one, 1, heads=4, kv_heads=2, head_dim=64)
    columns = (q, cache, cache, query_start, seq_lens, kv_start, ints(2, 0, 1), one, 1, 1, 1, 0.1)
    assert torch.equal(ops.paged_attention(*columns, plan=plan), ops.paged_attention(*columns))
    with pytest.raises(ValueError, match="plan has 9343 elements, 1 decodes need 9344"):
        ops.paged_attention(*columns, plan=plan[:9343])
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key/value heads"):
        ops.plan_decode(query_start, seq_lens, kv_start, one, 1, heads=4, kv_heads=3, head_dim=64)
    with pytest.raises(ValueError, match="prefix_lens is missing"):
        ops.plan_decode(query_start, seq_lens, kv_start, one, 1, 4, 2, 64, ints(0, 1), None, one, 16)
    with pytest.raises(ValueError, match="shares_prefixes is set, but plan is missing"):
        ops.paged_attention(*columns, shares_prefixes=True)


def test_a_negative_slot_is_padding_and_one_too_large_is_an_error() -> None:
    cache, k = torch.zeros(2, 1, 4, 64), torch.ones(2, 1, 64)
    store(cache, cache, k, k, torch.tensor([-1, 3]))
    assert cache.sum() == 64
    with pytest.raises(ValueError, match="slots holds 8"):
        store(cache, cache, k, k, torch.tensor([0, 8]))


def test_copy_blocks_copies_whole_blocks() -> None:
    cache = torch.arange(5, dtype=torch.bfloat16)[:, None].repeat(1, 300)
    ops.copy_blocks(cache, ints(4, 0), ints(1, 2))
    assert cache[:, 0].tolist() == [0, 4, 0, 3, 4]
    assert cache[:, -1].tolist() == [0, 4, 0, 3, 4]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_swap_blocks_copies_whole_blocks_between_caches(dtype: torch.dtype) -> None:
    here, there = torch.arange(5, dtype=torch.bfloat16)[:, None].repeat(1, 300), torch.full((3, 300), 9.0).bfloat16()
    ops.swap_blocks(there, here, torch.tensor([2, 0], dtype=dtype), torch.tensor([1, 4], dtype=dtype))
    assert there[:, 0].tolist() == there[:, -1].tolist() == [4, 9, 1]


def sample(logits: Tensor, **columns: Any) -> dict[str, Tensor]:
    """Rows without adjustments, greedy unless told otherwise, each with its log-probability and the top 2."""
    rows = logits.shape[0]
    named: dict[str, Tensor] = {
        "tokens": torch.empty(rows, dtype=torch.int32),
        "logprobs": torch.empty(rows, 3),
        "logprob_ids": torch.empty(rows, 3, dtype=torch.int32),
        "ranks": torch.empty(rows, dtype=torch.int32),
        "logits": logits.clone(),
        "temperature": torch.zeros(rows),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "repetition_penalty": torch.ones(rows),
        "top_k": torch.zeros(rows, dtype=torch.int32),
        "seeds": torch.zeros(rows, dtype=torch.int64),
        "positions": torch.zeros(rows, dtype=torch.int32),
        "num_logprobs": torch.full((rows,), 2, dtype=torch.int32),
        "adjust_start": torch.zeros(rows + 1, dtype=torch.int32),
        "adjust_ids": torch.empty(0, dtype=torch.int32),
        "adjust_add": torch.empty(0),
        "adjust_flags": torch.empty(0, dtype=torch.int32),
    }
    named.update(columns)
    _kernels.sample(**named)
    return named


def test_greedy_sampling_takes_the_largest_logit_and_reports_log_probabilities() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 1.0, 1.0, 9.0]])
    out = sample(logits)
    assert out["tokens"].tolist() == [1, 3]
    assert out["ranks"].tolist() == [1, 1]
    assert out["logprob_ids"].tolist() == [[1, 1, 2], [3, 3, 0]]
    expected = logits.log_softmax(-1).gather(1, out["logprob_ids"].long())
    torch.testing.assert_close(out["logprobs"], expected)


def test_adjustments_may_lie_apart_behind_what_is_nobodys() -> None:
    """As a batch has them: an id, the bits of what is added, flags, behind the batch's blocks."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]] * 3)
    entries = ints(10**6, -7, 9, 0, 0, 0, 2, 0, 2, 3, 0, 2).view(4, 3)
    entries.view(torch.float32)[1, 1] = 9.0
    apart = {"adjust_start": ints(1, 1, 2, 4), "adjust_ids": entries[:, 0], "adjust_flags": entries[:, 2]}
    apart["adjust_add"] = entries.view(torch.float32)[:, 1]
    assert sample(logits, **apart)["tokens"].tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match="strides 3, 1 and 3"):
        sample(logits, **apart | {"adjust_add": torch.zeros(4)})
    with pytest.raises(ValueError, match="adjust_ids holds 1000000"):
        sample(logits, **apart | {"adjust_start": ints(0, 1, 2, 4)})


def test_adjustments_and_the_allowed_set_reach_the_row_they_name() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]] * 3)
    out = sample(
        logits, adjust_start=ints(0, 0, 1, 3), adjust_ids=ints(0, 2, 3), adjust_add=torch.tensor([9.0, 0.0, 0.0]),
        adjust_flags=ints(0, 2, 2),
    )  # fmt: skip
    assert out["tokens"].tolist() == [1, 0, 2]


def test_sampling_depends_on_seed_and_position_only() -> None:
    logits = torch.zeros(1, 1000)
    draws = {
        (seed, position): sample(
            logits, temperature=torch.ones(1), seeds=torch.tensor([seed]), positions=ints(position)
        )["tokens"].item()
        for seed in range(4)
        for position in range(4)
    }
    assert len(set(draws.values())) > 10
    again = sample(logits.repeat(2, 1), temperature=torch.ones(2), seeds=torch.tensor([3, 1]), positions=ints(2, 0))[
        "tokens"
    ]
    assert again.tolist() == [draws[3, 2], draws[1, 0]]


def test_sampling_without_log_probabilities_needs_no_columns_for_them() -> None:
    out = sample(torch.tensor([[0.0, 1.0]]), logprobs=None, logprob_ids=None, ranks=None, num_logprobs=ints(-1))
    assert out["tokens"].tolist() == [1]
