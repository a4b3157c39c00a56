"""The dual LoRA linear layer: one frozen base, several serving adapters and the shadow that learns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from clif.kernels.dual_lora import Segment, add_dual_lora
from clif.ops import Linear, frozen_linear

SHADOW = -1


class BatchRows:
    """Which rows of the batch under way use which adapter slot; shared by all layers of a model.

    segments: disjoint, in row order; slot SHADOW is the adapter in training.
    """

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = ()


class DualLoraLinear(nn.Module):
    """y = x W^T + b + scale * (x A_s^T) B_s^T, with s the adapter slot of each row (none: the base alone).

    serving_a [slots, r, d_in] and serving_b [slots, d_out, r] are in the base dtype and never trained.
    shadow_a [r, d_in] and shadow_b [d_out, r] are float32 masters, trained, and cast to the base dtype when used.
    """

    serving_a: torch.Tensor
    serving_b: torch.Tensor

    def __init__(self, base: nn.Linear, r: int, scale: float, slots: int, rows: BatchRows) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self.register_buffer("serving_a", base.weight.new_zeros(slots, r, base.in_features), persistent=False)
        self.register_buffer("serving_b", base.weight.new_zeros(slots, base.out_features, r), persistent=False)
        self.shadow_a = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.shadow_b = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        # As peft does: A like a linear layer, B zero, so that an untrained adapter changes nothing.
        nn.init.kaiming_uniform_(self.shadow_a, a=math.sqrt(5))
        self._rows = rows
        self._packed: Linear | None = None

    def pack(self) -> None:
        """Lay the base weight out for serving where that pays."""
        self._packed = frozen_linear(self.weight, self.bias)

    def factors(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, d_in] and B [d_out, r] of a slot in the base dtype."""
        if slot == SHADOW:
            return self.shadow_a.to(self.weight.dtype), self.shadow_b.to(self.weight.dtype)
        return self.serving_a[slot], self.serving_b[slot]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, rows, d_in] -> [1, rows, d_out]."""
        if self._packed is not None and not torch.is_grad_enabled():
            y = self._packed(x)
        else:
            y = nn.functional.linear(x, self.weight, self.bias)
        if not self._rows.segments:
            return y
        return add_dual_lora(y[0], x[0], self._rows.segments, self.factors, self.scale).unsqueeze(0)
