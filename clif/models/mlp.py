"""The MLP of a decoder layer: an object that takes the hidden states of every kind of rows and returns theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clif.models.dual_linear import DualLinear, LoraRows
from clif.models.layer_ops import Activation


class GatedMlp:
    """down(activation(gate) * up), the gate and up projections in one product."""

    def __init__(self, gate_up: DualLinear, down: DualLinear, gate: Activation) -> None:
        """gate: [rows, gate | up] -> activation(gate) * up [rows, inner]."""
        self.gate_up, self.down, self.gate = gate_up, down, gate

    def __call__(self, hidden: Sequence[torch.Tensor], rows: Sequence[LoraRows]) -> list[torch.Tensor]:
        """hidden: [rows, hidden size], normalised, for each kind of rows; the same shapes come back."""
        return self.down([self.gate(wide) for wide in self.gate_up(hidden, rows)], rows)
