"""Products with frozen weights by the C++ kernels: with the factors of all slots, and of the gradient carried down."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clif.kernels.cpu.products import PackedFactors, empty_low, product
from clif.kernels.cpu.training import TrainingKernels
from clif.kernels.dual_lora_reference import Segment
from clif.models.base_weight import BaseWeight, Compiled

MOST_RANK = 512
"""Of merged factors: beyond it a strip of them no longer fits the memory that the kernels take."""


def multiplies(base: BaseWeight, rank: int = 0) -> bool:
    """Whether the kernels compute the backward of a weight with factors of this rank (0: none) beside it."""
    weight = base.tensors[0]
    out, in_ = base.shape
    plain = weight.shape == base.shape and weight.is_contiguous() and weight.dtype == torch.bfloat16
    return plain and out % 32 == 0 and in_ % 32 == 0 and rank <= MOST_RANK


def base_backward(base: BaseWeight, grad: torch.Tensor, kernels: TrainingKernels | None) -> torch.Tensor:
    """Gradient of the output [rows, out] -> that of the input, grad W [rows, in], in fresh memory."""
    if kernels is None or not multiplies(base):
        return base.backward(grad)
    return kernels.linear_backward(base.tensors[0], grad)


def packed_product(
    x: torch.Tensor, base: Compiled, factors: PackedFactors, segments: Sequence[Segment]
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, in] -> base and adapters of the segments [rows, out], and x A_s^T [rows, at least k r].

    The factors are those of all slots, the shadow's last.
    """
    slots, low = torch.full((len(x),), -1, dtype=torch.int32), empty_low(len(x), factors)
    for start, stop, slot in segments:
        slots[start:stop] = slot % len(factors.a)
    return product(x, base.matrix, base.bias, factors, slots, low=low), low
