"""How a launch of the paged decode kernel is split. Free of Triton and torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class DecodeConfig:
    """How paged_decode is computed; its result is the same up to roundings.

    block_kv: tokens of a step, a power of two of at least 16; parts: the most parts of a context; least: the fewest
    tokens of a part, a multiple of block_kv. Both split a context by its own length only, whatever else is in the
    batch. programs: per multiprocessor. stages: with 5, two steps of K and V are in flight while one is computed; a
    step takes two stages, since its slots must be looked up before it is loaded. Raises ValueError.
    """

    block_kv: int = 64
    parts: int = 16
    least: int = 256
    warps: int = 4
    stages: int = 5
    programs: int = 4

    def __post_init__(self) -> None:
        if self.block_kv < 16 or self.block_kv & (self.block_kv - 1):
            raise ValueError(f"block_kv {self.block_kv} is not a power of two of at least 16")
        if self.least < 1 or self.least % self.block_kv:
            raise ValueError(f"least {self.least} is not a multiple of block_kv {self.block_kv}")
        if self.parts < 1:
            raise ValueError(f"parts {self.parts} is below 1")
        if self.programs < 1:
            raise ValueError(f"programs {self.programs} is below 1")

    def most_parts(self, tokens: int) -> int:
        """Parts of a context of this length; shorter ones have no more."""
        return max(1, min(self.parts, tokens // self.least))

    def part_lengths(self, tokens: int) -> list[int]:
        """Tokens of each part of a context, as the kernel splits it."""
        parts, steps = self.most_parts(tokens), -(-tokens // self.block_kv)
        ends = [min(part * steps // parts * self.block_kv, tokens) for part in range(parts + 1)]
        return [end - begin for begin, end in pairwise(ends)]


@dataclass(frozen=True)
class DecodeShape:
    """What a launch is compiled for: heads of query and of the cache, numbers of a head, and bytes of each in the
    cache."""

    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int


def default_config(shape: DecodeShape) -> DecodeConfig:
    """The split of unmeasured shapes, by reasoning.

    A step has 8,192 numbers of K and V, and 16 KiB at most; two steps are in flight. Four programs of
    heads of up to 128 numbers then fit the shared memory and the registers of a multiprocessor of compute capability
    8.0 or 9.0, two or three that of 8.6 or 8.9. A part has 64 KiB at least, so that the exchange of partial sums is
    small beside the reading. The parts of a context are equal to within a step, whatever its length.
    """
    token, padded = 2 * shape.head_dim * shape.itemsize, 2 * max(16, power_of_two(shape.head_dim))
    block_kv = max(16, min(128, 8192 // padded, (16 << 10) // (padded * shape.itemsize)))
    return DecodeConfig(block_kv=block_kv, least=max(block_kv, power_of_two((64 << 10) // token)))


def power_of_two(count: int) -> int:
    """The smallest one that is not below a count, at least 1."""
    return 1 << max(0, count - 1).bit_length()
