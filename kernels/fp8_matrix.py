"""Matrices of float8_e4m3fn with one scale for each output: how they are made, and what they stand for. Free of Triton.

A number has three bits of mantissa, so that it is at most 1/16 from what it stands for, however large it is beside
others of its output: the scale brings the largest to the end of the range, and smaller ones are as near for 2^15 of it.

Sources: FP8 formats (Micikevicius et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clif.kernels.kv_types import FP8, FP8_MOST
from clif.kernels.quantised import PIECE, strips


@dataclass(frozen=True, eq=False)
class Fp8Matrix:
    """W [out, in_] = numbers * scales. numbers: FP8 [out, in_]; scales: float32 [out, 1], as torch._scaled_mm reads
    them."""

    numbers: torch.Tensor
    scales: torch.Tensor

    @property
    def out(self) -> int:
        return len(self.numbers)

    @property
    def in_(self) -> int:
        return self.numbers.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Numbers and scales."""
        return self.numbers, self.scales

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fp8Matrix:
        """The nearest to a weight [out, in], on its device; a piece of it is held in float32 at a time."""
        out, in_ = weight.shape
        # Bytes, since not every operator of every torch knows the type.
        numbers = torch.empty(out, in_, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(out, 1, dtype=torch.float32, device=weight.device)
        for rows in strips(out, in_, PIECE):
            piece = weight[rows].float()
            scale = piece.abs().amax(1, keepdim=True) / FP8_MOST
            scales[rows] = scale.masked_fill_(scale == 0, 1.0)
            numbers[rows] = (piece / scale).clamp_(-FP8_MOST, FP8_MOST).to(FP8).view(torch.uint8)
        return cls(numbers.view(FP8), scales)

    def select(self, rows: slice) -> Fp8Matrix:
        """A view of some outputs."""
        return Fp8Matrix(self.numbers[rows], self.scales[rows])

    def dense(self, dtype: torch.dtype, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """W [rows, columns], each number rounded once to dtype."""
        return self.numbers[rows, columns].float().mul_(self.scales[rows]).to(dtype)
