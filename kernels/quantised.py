"""Matrices of whole numbers with scales: how they are made, and what they stand for. The reference of all kernels.

Weights of 8 bits have one scale for each output; those of 4 bits one for each GROUP inputs of an output. Both are
symmetric. A scale is a bfloat16 number, and the whole numbers are chosen for it as it is: nothing is rounded twice.

Sources: round-to-nearest weights by output (LLM.int8(), Dettmers et al. 2022) and by group (GPTQ, Frantar et al. 2022,
and Q4_0 of llama.cpp, whose largest number takes the whole range).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Bits = Literal[8, 4]
GROUP = 32
"""Inputs that share a scale in 4 bits: as many as the C++ kernels multiply at once."""
MOST = {8: 127, 4: 8}
"""The largest number is this one or its negative: -127 to 127, -8 to 7."""
PIECE = 1 << 18
"""Numbers that are computed with in float32 at a time: they stay in a CPU's caches."""


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """W [out, in_] = numbers * scales.

    numbers: int8 [out, in_]; of 4 bits uint8 [out, inputs / 2], with zeros up to whole groups: two in a byte, the first
    in its lower half, each plus 8. scales: bfloat16 [out, 1]; of 4 bits [out, groups].
    """

    bits: Bits
    in_: int
    numbers: torch.Tensor
    scales: torch.Tensor

    @property
    def out(self) -> int:
        return len(self.numbers)

    @classmethod
    def of(cls, weight: torch.Tensor, bits: Bits) -> QuantisedMatrix:
        """The nearest to a weight [out, in], on its device; a piece of it is held in float32 at a time."""
        pieces = [_quantised(weight[rows].float(), bits) for rows in strips(len(weight), weight.shape[1], PIECE)]
        numbers, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return cls(bits, weight.shape[1], numbers, scales)

    def dense(self, dtype: torch.dtype, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """W [rows, columns], each number rounded once to dtype. Columns begin at a whole group."""
        start, stop, _ = columns.indices(self.in_)
        if self.bits == 8:
            numbers, scales = self.numbers[rows, start:stop].float(), self.scales[rows].float()
            return numbers.mul_(scales).to(dtype)
        groups = slice(start // GROUP, -(-stop // GROUP))
        packed = self.numbers[rows, groups.start * GROUP // 2 : groups.stop * GROUP // 2]
        numbers = (torch.stack((packed & 15, packed >> 4), -1).flatten(1).float() - 8).unflatten(1, (-1, GROUP))
        whole = numbers.mul_(self.scales[rows, groups].float().unsqueeze(2)).flatten(1)
        return whole[:, : stop - start].to(dtype)


def strips(count: int, width: int, numbers: int, unit: int = 1) -> Iterator[slice]:
    """Ranges of `count` rows of `width` numbers each, about `numbers` at a time, in whole multiples of `unit` rows."""
    step = max(1, numbers // (width * unit)) * unit
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _quantised(weight: torch.Tensor, bits: Bits) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and scales of weights [out, in] in float32."""
    if bits == 8:
        scale = _scale(weight.abs().amax(1, keepdim=True) / MOST[8])
        return _rounded(weight, scale, 8).to(torch.int8), scale.bfloat16()
    out, in_ = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -in_ % GROUP)).view(out, -1, GROUP)
    # The number furthest from zero becomes -8, so that the whole range is used.
    most, least = groups.amax(2, keepdim=True), groups.amin(2, keepdim=True)
    scale = _scale(torch.where(most > -least, most, least) / -MOST[4])
    numbers = (_rounded(groups, scale, 4) + 8).to(torch.uint8).flatten(1)
    return numbers[:, 0::2] | numbers[:, 1::2] << 4, scale.squeeze(2).bfloat16()


def _scale(scale: torch.Tensor) -> torch.Tensor:
    """As bfloat16 holds it; 1 where all numbers are zero."""
    rounded = scale.bfloat16().float()
    return rounded.masked_fill_(rounded == 0, 1.0)


def _rounded(weight: torch.Tensor, scale: torch.Tensor, bits: Bits) -> torch.Tensor:
    least, most = (-MOST[8], MOST[8]) if bits == 8 else (-MOST[4], MOST[4] - 1)
    return (weight / scale).round_().clamp_(least, most)
