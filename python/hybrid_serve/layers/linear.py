"""Linear: a packed weight with its bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


class Linear:
    """x [rows, k] -> [rows, n]. Several projections of one input share one Linear, their rows stacked."""

    def __init__(self, weight: ops.PackedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        """``dtype``: of the result, where it is not the input's (logits)."""
        self.weight, self.bias, self.dtype = weight, bias, dtype

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.dtype, out)
