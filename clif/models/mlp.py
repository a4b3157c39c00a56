"""The MLP of a decoder layer: an object that takes the hidden states of every kind of rows and returns theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from clif.models.dual_linear import DualLinear, LoraRows


class GatedMlp:
    """down(activation(gate) * up), the gate and up projections in one product."""

    def __init__(
        self,
        gate_up: DualLinear,
        down: DualLinear,
        sizes: list[int],
        activation: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """sizes: columns of gate and of up on this rank."""
        self.gate_up, self.down, self._sizes, self._act = gate_up, down, sizes, activation
        probe = torch.linspace(-4, 4, 64)
        self._is_silu = torch.equal(self._act(probe), nn.functional.silu(probe))

    def __call__(self, hidden: Sequence[torch.Tensor], rows: Sequence[LoraRows]) -> list[torch.Tensor]:
        """hidden: [rows, hidden size], normalised, for each kind of rows; the same shapes come back."""
        return self.down([self._gate(wide) for wide in self.gate_up(hidden, rows)], rows)

    def _gate(self, wide: torch.Tensor) -> torch.Tensor:
        if self._is_silu and wide.requires_grad:
            gated: torch.Tensor = _SwiGLU.apply(wide)
            return gated
        gate, up = wide.split(self._sizes, -1)
        return self._act(gate) * up


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [rows, gate and up]: keeps its input alone, and its gradient is written in one piece."""

    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(wide)
        gate, up = wide.chunk(2, -1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (wide,) = ctx.saved_tensors
        gate, up = wide.chunk(2, -1)
        grad = torch.empty_like(wide)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.mul(nn.functional.silu(gate), gradients[0], out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(gradients[0] * up, gate))
        return grad
