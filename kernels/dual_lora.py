"""Low-rank part of a linear layer for rows of several adapters: the torch reference.

    y[rows of slot s] += scale * (x A_s^T) B_s^T

It is the CPU path, and the specification of any faster kernel that takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """Rows [start, stop) of a packed batch that use one adapter slot. Rows in no segment use none."""

    start: int
    stop: int
    slot: int


def add_dual_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    segments: Sequence[Segment],
    factors: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    scale: float,
) -> torch.Tensor:
    """Return y with the low-rank part added; y itself may be written to.

    y: [rows, d_out], the base layer's fresh output; x: [rows, d_in]; segments do not overlap.
    factors(slot): A [r, d_in] and B [d_out, r] in y's dtype. One adapter per segment, chosen by index and never
    by multiplying with a mask: a NaN in one adapter must not reach the rows of another.
    """
    for start, stop, slot in segments:
        a, b = factors(slot)
        if start == 0 and stop == x.shape[0]:
            return torch.addmm(y, x @ a.T, b.T, alpha=scale)
        y[start:stop].addmm_(x[start:stop] @ a.T, b.T, alpha=scale)
    return y
