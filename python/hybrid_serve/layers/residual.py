"""The residual stream, and the norm between it and a product; they know no layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .linear import Linear


class Residual:
    """The sum of what the layers gave so far. In f32, so that a 16-bit model rounds each layer's input and output only.

    There are two memories for it, which take turns: who adds to the sum leaves the one that others may still read."""

    def __init__(self, first: Tensor) -> None:
        """``first``: T [rows, hidden], what will begin it."""
        self.sum, self._other = (torch.empty(first.shape, dtype=torch.float32, device=first.device) for _ in range(2))
        self._is_empty = True

    def turn(self) -> tuple[Tensor, Tensor, bool]:
        """The sum, where the next one goes, and whether there is none yet."""
        last, begins = self.sum, self._is_empty
        self.sum, self._other, self._is_empty = self._other, last, False
        return last, self.sum, begins

    def select(self, rows: Tensor) -> None:
        """``rows``: more than there are, perhaps: a small batch may be padded to more sequences than tokens."""
        self.sum = self.sum.index_select(0, rows)
        self._other = torch.empty_like(self.sum)


class NormedLinear:
    """A Linear of the normed residual stream. Its norm folds in the addition of what the layer before it gave."""

    def __init__(self, norm: Tensor, eps: float, linear: Linear) -> None:
        """norm: T [k]."""
        self.norm, self.eps, self.linear = norm, eps, linear

    def __call__(
        self, x: Tensor, residual: Residual, normed: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``residual += x``, T [rows, k]; -> the product with the norm of the sum. ``normed`` like x, memory."""
        return self._product(x, residual, None, normed, out)

    def silu_mul(self, x: Tensor, residual: Residual, gate_up: Tensor, normed: Tensor, out: Tensor) -> Tensor:
        """The same, of a gate and an up projection side by side: silu(gate) * up. ``gate_up``, T [rows, n], memory."""
        return self._product(x, residual, gate_up, normed, out)

    def _product(
        self, x: Tensor, residual: Residual, gate_up: Tensor | None, normed: Tensor | None, out: Tensor | None
    ) -> Tensor:
        last, sum, begins = residual.turn()
        linear = self.linear
        return ops.norm_linear(
            x,
            self.norm,
            last,
            sum,
            self.eps,
            linear.weight,
            linear.bias,
            linear.dtype,
            gate_up,
            normed,
            out,
            begins,
        )
