"""GatedMlp: down(silu(gate(x)) * up(x)) of the normed residual stream."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .linear import Linear
from .residual import NormedLinear, Residual


class MlpScratch(NamedTuple):
    """Memory that every layer of a step writes its intermediate results to."""

    gate_up: Tensor  # T [rows, 2 * inner]
    product: Tensor  # T [rows, inner]
    out: Tensor  # T [rows, hidden]


class GatedMlp:
    def __init__(self, gate_up: NormedLinear, down: Linear) -> None:
        """``gate_up`` yields both projections side by side."""
        self.gate_up, self.down = gate_up, down

    def scratch(self, x: Tensor) -> MlpScratch:
        """For inputs of the shape of ``x``."""
        rows = x.shape[0]
        return MlpScratch(
            x.new_empty((rows, self.gate_up.linear.weight.n)),
            x.new_empty((rows, self.down.weight.k)),
            x.new_empty(x.shape),
        )

    def __call__(self, x: Tensor, residual: Residual, normed: Tensor, scratch: MlpScratch) -> Tensor:
        """Of ``residual += x``, T [rows, hidden] -> ``scratch.out``, to be added next. ``normed`` like x, memory."""
        product = self.gate_up.silu_mul(x, residual, scratch.gate_up, normed, scratch.product)
        return self.down(product, scratch.out)
