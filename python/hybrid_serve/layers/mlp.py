"""GatedMlp: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from .linear import Linear


class GatedMlp:
    def __init__(self, gate_up: Linear, down: Linear) -> None:
        """``gate_up`` yields both projections side by side."""
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: Tensor) -> Tensor:
        """x: T [rows, hidden] -> the same shape."""
        return self.down(ops.silu_mul(self.gate_up(x)))
