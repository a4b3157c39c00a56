"""Matrices of whole numbers with scales: how they are made, and what they stand for. The reference of all kernels.

Weights of 8 bits have one scale for each output; those of 4 bits one for each GROUP inputs of an output, and a least
number as well where that is much nearer: the weights of many GGUF files are such numbers already. Scales are bfloat16
numbers, and the whole numbers are chosen for them as they are: nothing is rounded twice.

Sources: round-to-nearest weights by output (LLM.int8(), Dettmers et al. 2022) and by group (GPTQ, Frantar et al. 2022,
and Q4_0 of llama.cpp, whose largest number takes the whole range).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

Bits = Literal[8, 4]
GROUP = 32
"""Inputs that share a scale in 4 bits: as many as the C++ kernels multiply at once."""
PIECE = 1 << 18
"""Numbers that are computed with in float32 at a time: they stay in a CPU's caches."""


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """W [out, in_] = numbers * scales, plus `least` in 4 bits.

    numbers: int8 [out, in_]; of 4 bits uint8 [out, inputs / 2], up to whole groups: two numbers from 0 to 15 in a byte,
    the first in its lower half. scales: bfloat16 [out, 1]; of 4 bits [out, groups]. least: bfloat16 [out, groups];
    None: -8 times the scales.
    """

    bits: Bits
    in_: int
    numbers: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor | None = None

    @property
    def out(self) -> int:
        return len(self.numbers)

    @classmethod
    def of(cls, weight: torch.Tensor, bits: Bits) -> QuantisedMatrix:
        """The nearest to a weight [out, in], on its device; a piece of it is held in float32 at a time."""
        out, in_ = weight.shape
        pieces = [weight[rows] for rows in strips(out, in_, PIECE)]
        if bits == 8:
            numbers, scales = _joined(_by_output(piece.float()) for piece in pieces)
            return cls(8, in_, numbers, scales)
        if _has_least(_groups(pieces[0])):
            return cls(4, in_, *_joined(_by_range(_groups(piece)) for piece in pieces))
        return cls(4, in_, *_joined(_by_largest(_groups(piece)) for piece in pieces))

    def whole(self, rows: slice) -> torch.Tensor:
        """The whole numbers of some outputs: int8 [rows, in_]; of 4 bits uint8 [rows, inputs], up to whole groups."""
        numbers = self.numbers[rows]
        return numbers if self.bits == 8 else torch.stack((numbers & 15, numbers >> 4), -1).flatten(1)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Numbers and scales."""
        return (self.numbers, self.scales) if self.least is None else (self.numbers, self.scales, self.least)

    def dense(self, dtype: torch.dtype, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """W [rows, columns], each number rounded once to dtype. Columns begin at a whole group."""
        start, stop, _ = columns.indices(self.in_)
        if self.bits == 8:
            numbers, scales = self.numbers[rows, start:stop].float(), self.scales[rows].float()
            return numbers.mul_(scales).to(dtype)
        groups = slice(start // GROUP, -(-stop // GROUP))
        packed = self.numbers[rows, groups.start * GROUP // 2 : groups.stop * GROUP // 2]
        numbers = torch.stack((packed & 15, packed >> 4), -1).flatten(1).float().unflatten(1, (-1, GROUP))
        scales = self.scales[rows, groups].float()
        least = scales * -8 if self.least is None else self.least[rows, groups].float()
        whole = torch.addcmul(least.unsqueeze(2), numbers, scales.unsqueeze(2)).flatten(1)
        return whole[:, : stop - start].to(dtype)


def strips(count: int, width: int, numbers: int, unit: int = 1) -> Iterator[slice]:
    """Ranges of `count` rows of `width` numbers each, about `numbers` at a time, in whole multiples of `unit` rows."""
    step = max(1, numbers // (width * unit)) * unit
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _joined(pieces: Iterable[tuple[torch.Tensor, ...]]) -> Iterator[torch.Tensor]:
    return (torch.cat(parts) for parts in zip(*pieces, strict=True))


def _by_output(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of 8 bits and scales [out, 1] of weights [out, in] in float32."""
    scale = _scale(weight.abs().amax(1, keepdim=True) / 127)
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale.bfloat16()


def _groups(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [out, groups, GROUP] in float32. What is missing is 0, which no group's numbers are chosen for."""
    return pad(weight.float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)


def _by_largest(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of 4 bits and scales [out, groups]. The number furthest from zero is -8: the whole range is used."""
    most, least = groups.amax(2, keepdim=True), groups.amin(2, keepdim=True)
    scale = _scale(torch.where(most > -least, most, least) / -8)
    return _two_in_a_byte((groups / scale).round_() + 8), scale.squeeze(2).bfloat16()


def _by_range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of 4 bits, scales and least numbers [out, groups]."""
    most, least = groups.amax(2, keepdim=True), groups.amin(2, keepdim=True).bfloat16()
    scale = _scale((most - least) / 15)
    numbers = _two_in_a_byte(((groups - least) / scale).round_())
    return numbers, scale.squeeze(2).bfloat16(), least.squeeze(2)


def _has_least(groups: torch.Tensor) -> bool:
    """Whether least numbers make these weights much nearer, and are worth their memory."""
    errors = []
    for numbers, scales, *least in (_by_largest(groups), _by_range(groups)):
        matrix = QuantisedMatrix(4, groups.shape[1] * GROUP, numbers, scales, *least)
        errors.append(float((matrix.dense(torch.float32) - groups.flatten(1)).norm()))
    return errors[1] < errors[0] / 2


def _two_in_a_byte(numbers: torch.Tensor) -> torch.Tensor:
    """Whole numbers [out, groups, GROUP] -> [out, inputs / 2]."""
    whole = numbers.clamp_(0, 15).to(torch.uint8).flatten(1)
    return whole[:, 0::2] | whole[:, 1::2] << 4


def _scale(scale: torch.Tensor) -> torch.Tensor:
    """As bfloat16 holds it; 1 where all numbers are zero."""
    rounded = scale.bfloat16().float()
    return rounded.masked_fill_(rounded == 0, 1.0)
