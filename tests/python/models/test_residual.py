"""The residual stream and the products of its norm."""

from __future__ import annotations

import torch

from hybrid_serve import ops
from hybrid_serve.layers.linear import Linear
from hybrid_serve.layers.residual import NormedLinear, Residual


def test_more_rows_are_sampled_than_there_are_tokens() -> None:
    """A small batch may be padded to 32 tokens of 64 sequences: rows that belong to nobody are any token's."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 64).unbind()
    norm, weight = torch.rand(64), torch.randn(5, 64)
    normed_linear = NormedLinear(norm, 1e-6, Linear(ops.pack_weight(weight)))
    residual = Residual(x)
    normed_linear(x, residual)
    rows = torch.tensor([2, 0, 1, 0, 0, 2, 1, 1])
    residual.select(rows)
    total = (x + y)[rows]
    expected = total * torch.rsqrt(total.square().mean(1, keepdim=True) + 1e-6) * norm @ weight.T
    assert torch.allclose(normed_linear(y[rows], residual), expected, atol=1e-4)
