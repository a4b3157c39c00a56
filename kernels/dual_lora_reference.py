"""Low-rank part of a linear layer for rows of several adapters, forward and backward: the torch reference.

    y[rows of slot s] += scale * (x A_s^T) B_s^T

It is the CPU path, and the specification of the faster kernels.

Sources: Hu et al. 2021 (LoRA); Chen et al. 2023 (Punica) and Sheng et al. 2023 (S-LoRA): segments of rows per adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import linear

SHADOW = -1
"""The shadow's slot: the last one."""


class Segment(NamedTuple):
    """Rows [start, stop) of a packed batch that use one adapter slot. Rows in no segment use none."""

    start: int
    stop: int
    slot: int


@dataclass(frozen=True)
class Projection:
    """Outputs [start, stop) of a merged layer that belong to one linear layer; block: its index in h, or None."""

    start: int
    stop: int
    block: int | None


class Product(Protocol):
    """A frozen weight [out, in] and its bias, however it is stored."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, out]."""
        ...

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of the output [rows, out] -> that of the input [rows, in]."""
        ...


@dataclass(frozen=True, eq=False)
class MergedLinear:
    """A merged linear layer and its adapters, as the kernels read them; everything is a view, nothing is copied.

    weight [out, in]; bias [out] or None; a [slots, k r, in] and b [slots, out, k r] for k adapted members, b with each
    member's factor in its own rows and columns. The last slot is the shadow's. base: multiplies with a weight that is
    not dense; `weight` then has its shape alone, and is NaN.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    r: int
    scale: float
    projections: tuple[Projection, ...]
    base: Product | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base product of x [rows, in], in fresh memory."""
        return linear(x, self.weight, self.bias) if self.base is None else self.base.forward(x)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of the output [rows, out] through the base, in fresh memory."""
        return linear(grad, self.weight.T) if self.base is None else self.base.backward(grad)

    @property
    def blocks(self) -> int:
        """Adapted members."""
        return self.a.shape[1] // self.r


def add_dual_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    segments: Sequence[Segment],
    factors: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    scale: float,
) -> None:
    """Add the low-rank part to y in place.

    y: [rows, d_out], the base layer's fresh output; x: [rows, d_in]; segments do not overlap.
    factors(slot): A [r, d_in] and B [d_out, r] in y's dtype. One adapter per segment, chosen by index and never
    by multiplying with a mask: a NaN in one adapter must not reach the rows of another.
    """
    for start, stop, slot in segments:
        a, b = factors(slot)
        rows, out = (x, y) if stop - start == len(x) else (x[start:stop], y[start:stop])
        out.addmm_(rows @ a.T, b.T, alpha=scale)


def add_dual_lora_by_slot(
    y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> None:
    """The same for rows whose slots lie on the device, for captured steps: segments of the host would never change.

    slots [rows]: -1 for none; a [slots, k r, in], b [slots, out, k r].
    Every slot is computed for every row, and the result is selected: a NaN in one adapter must not reach the rows of
    another.
    """
    low = (x @ a.flatten(0, 1).T).split(a.shape[1], 1)
    for slot, (hidden, factor) in enumerate(zip(low, b, strict=True)):
        added = torch.addmm(y, hidden, factor.T, alpha=scale)
        y.copy_(torch.where((slots == slot)[:, None], added, y))


def shadow_forward(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Add scale * (x A^T) B^T to y in place and return x A^T [rows, r], which the backward needs."""
    hidden = x @ a.T
    y.addmm_(hidden, b.T, alpha=scale)
    return hidden


def shadow_backward(
    grad: torch.Tensor,
    grad_x: torch.Tensor | None,
    x: torch.Tensor,
    hidden: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients of x, A and B, given that of y [rows, d_out].

    grad_x: the gradient through the base, grad W [rows, d_in]; it is added to in place (None: not wanted).
    Returns (grad_x, grad_a [r, d_in], grad_b [d_out, r]).
    """
    grad_hidden = (grad @ b).mul_(scale)
    if grad_x is not None:
        grad_x.addmm_(grad_hidden, a)
    return grad_x, grad_hidden.T @ x, (grad.T @ hidden).mul_(scale)
