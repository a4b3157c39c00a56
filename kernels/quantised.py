"""Matrices of whole numbers with scales: how they are made, and what they stand for. The reference of all kernels.

Weights that are quantised here have one scale for each output in 8 bits; in 4 bits one for each GROUP inputs of an
output, and a least number as well where that is much nearer. Scales are bfloat16 numbers, and the whole numbers are
chosen for them as they are: nothing is rounded twice. Weights that a checkpoint has quantised keep its numbers: groups
of other sizes, in 8 bits as well, scales of other types, and zero points.

Sources: round-to-nearest weights by output (LLM.int8(), Dettmers et al. 2022) and by group (GPTQ, Frantar et al. 2022,
and Q4_0 of llama.cpp, whose largest number takes the whole range).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    """W [out, in_] = (numbers - zeros) * scales, or numbers * scales + least.

    numbers: int8 [out, in_]; of 4 bits uint8 [out, inputs / 2], up to whole multiples of GROUP: two numbers from 0 to
    15 in a byte, the first in its lower half. scales: of any floating type, [out, groups]. least: the same, or None;
    zeros: int8 [out, groups], or None: 8 in 4 bits, 0 in 8. group: inputs that share a scale, a multiple of 16; None:
    all in 8 bits, GROUP in 4.
    """

    bits: Bits
    in_: int
    numbers: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    group: int | None = None

    @property
    def out(self) -> int:
        return len(self.numbers)

    @property
    def by_output(self) -> bool:
        """Whether each output has one scale, and nothing is added."""
        return self.bits == 8 and self.group is None

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

    def to(self, device: torch.device) -> QuantisedMatrix:
        """The same on a device."""
        return self._each(lambda t: t.to(device))

    def select(self, rows: slice | torch.Tensor) -> QuantisedMatrix:
        """Some of the outputs, by a slice or by their numbers: views with the former."""
        return self._each(lambda t: t[rows])

    def cut(self, start: int, stop: int) -> QuantisedMatrix:
        """Inputs [start, stop), in groups of as many as lie in it whole. Raises ValueError for groups below 16."""
        if self.by_output:
            return replace(self, in_=stop - start, numbers=self.numbers[:, start:stop].contiguous())
        old = self.group or GROUP
        group = math.gcd(old, start, old if stop == self.in_ else stop)
        if group % 16:
            raise ValueError(f"inputs {start} to {stop} of {self.in_} are no whole multiples of 16")
        groups = slice(start // group, -(-stop // group))
        part = self._each(lambda t: t if t is self.numbers else t.repeat_interleave(old // group, 1)[:, groups])
        numbers = self.numbers[:, start:stop]
        if self.bits == 4:
            numbers = self.numbers[:, start // 2 : -(-stop // 2)]
            numbers = pad(numbers, (0, -numbers.shape[1] % (GROUP // 2)))
        return replace(part, in_=stop - start, numbers=numbers.contiguous(), group=group)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> QuantisedMatrix:
        names = ("numbers", "scales", "least", "zeros")
        found = {name: getattr(self, name) for name in names}
        return replace(self, **{name: change(t) for name, t in found.items() if t is not None})

    def whole(self, rows: slice) -> torch.Tensor:
        """The whole numbers of some outputs: int8 [rows, in_]; of 4 bits uint8 [rows, inputs], up to whole groups."""
        numbers = self.numbers[rows]
        return numbers if self.bits == 8 else unpacked(numbers)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Numbers and scales."""
        return tuple(t for t in (self.numbers, self.scales, self.least, self.zeros) if t is not None)

    def dense(self, dtype: torch.dtype, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """W [rows, columns], each number rounded once to dtype."""
        start, stop, _ = columns.indices(self.in_)
        if self.by_output:
            return self.numbers[rows, start:stop].float().mul_(self.scales[rows].float()).to(dtype)
        group = self.group or GROUP
        groups = slice(start // group, -(-stop // group))
        begin, end = groups.start * group, groups.stop * group
        packed = self.numbers[rows, begin:end] if self.bits == 8 else self.numbers[rows, begin // 2 : end // 2]
        numbers = packed.float() if self.bits == 8 else unpacked(packed).float()
        numbers = pad(numbers, (0, end - begin - numbers.shape[1])).unflatten(1, (-1, group))
        scales, least, zeros = (
            None if t is None else t[rows, groups].float().unsqueeze(2) for t in (self.scales, self.least, self.zeros)
        )
        assert scales is not None
        if least is not None:
            whole = torch.addcmul(least, numbers, scales)
        else:
            zero = zeros if zeros is not None else 8 if self.bits == 4 else 0
            whole = numbers.sub_(zero).mul_(scales)
        return whole.flatten(1)[:, start - begin : stop - begin].to(dtype)


def unpacked(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes with two numbers each [rows, inputs / 2] -> [rows, inputs]."""
    return torch.stack((numbers & 15, numbers >> 4), -1).flatten(1)


def two_in_a_byte(whole: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 15, uint8 [out, inputs] -> [out, inputs / 2], with zeros up to whole multiples of GROUP."""
    whole = pad(whole, (0, -whole.shape[1] % GROUP))
    return whole[:, 0::2] | whole[:, 1::2] << 4


def joined(matrices: Sequence[QuantisedMatrix]) -> QuantisedMatrix | None:
    """Matrices of one form, one below the other; None where they are of several."""
    first, kinds = matrices[0], {(m.bits, m.in_, m.group, *map(_kind, (m.scales, m.least, m.zeros))) for m in matrices}
    if len(kinds) > 1:
        return None
    numbers, scales, *rest = (torch.cat(parts) for parts in zip(*(matrix.tensors for matrix in matrices), strict=True))
    least, zeros = (rest[0] if rest and each is not None else None for each in (first.least, first.zeros))
    return replace(first, numbers=numbers, scales=scales, least=least, zeros=zeros)


def _kind(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


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
    return two_in_a_byte(numbers.clamp_(0, 15).to(torch.uint8).flatten(1))


def _scale(scale: torch.Tensor) -> torch.Tensor:
    """As bfloat16 holds it; 1 where all numbers are zero."""
    rounded = scale.bfloat16().float()
    return rounded.masked_fill_(rounded == 0, 1.0)
