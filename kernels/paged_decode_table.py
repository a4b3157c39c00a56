"""The cache blocks of each sequence of a decode batch, on the device, and the split of a launch. Free of Triton."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from clif.kernels.staging import ALIGNED, Staged, aligned


class DecodeRow(NamedTuple):
    """One sequence: its row in the batch, its tokens in the cache (the new one included), and its blocks in order."""

    row: int
    length: int
    blocks: Sequence[int]


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

    A step moves 16 KiB of K and V, two of which are in flight: four programs then fit the shared memory and the
    registers of a multiprocessor of compute capability 8.0 or 9.0, two that of 8.6 or 8.9, and have 64 KiB or more in
    flight. A part has 64 KiB at least: for less, the exchange of partial sums takes longer than the reading that it
    would share out. The parts of a context are equal to within a step, whatever its length.
    """
    token = 2 * shape.head_dim * shape.itemsize
    padded = 2 * max(16, _power(shape.head_dim)) * shape.itemsize
    block_kv = max(16, min(128, (16 << 10) // padded))
    return DecodeConfig(block_kv=block_kv, least=max(block_kv, _power((64 << 10) // token) if token else block_kv))


class DecodeTable:
    """The sequences of a decode batch on the device, as the kernel reads them.

    counts [1]: sequences; rows and lengths [capacity]; blocks [capacity, max_blocks], each row padded with its last
    block. All int32, all views of one tensor `words`, which its owner fills.
    """

    def __init__(self, words: torch.Tensor, capacity: int, max_blocks: int, block_size: int) -> None:
        if min(capacity, max_blocks, block_size) < 1:
            raise ValueError(f"capacity {capacity}, max_blocks {max_blocks}, block_size {block_size}: all at least 1")
        self.capacity, self.max_blocks, self.block_size = capacity, max_blocks, block_size
        self.counts, self.rows, self.lengths, self.blocks = parts_of(words, capacity, max_blocks)

    def first(self, capacity: int) -> DecodeTable:
        """A table of the first sequences only, in the same memory."""
        table = copy.copy(self)
        table.capacity = capacity
        table.rows, table.lengths, table.blocks = (t[:capacity] for t in (self.rows, self.lengths, self.blocks))
        return table


class StagedDecodeTable(DecodeTable):
    """A table with memory of its own; `refill` puts other sequences in its place for the same launch, in one copy."""

    def __init__(self, capacity: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._staged = Staged.zeros(table_words(max(capacity, 1), max(max_blocks, 1)), torch.int32, device)
        super().__init__(self._staged.words, capacity, max_blocks, block_size)

    @classmethod
    def make(
        cls,
        sequences: Sequence[DecodeRow],
        block_size: int,
        device: torch.device,
        capacity: int = 0,
        max_blocks: int = 0,
    ) -> StagedDecodeTable:
        """A table with these sequences; capacity and max_blocks: what `refill` may need later, in a captured graph.

        Both are the next power of two if they are not given, so that few shapes are launched. Raises ValueError.
        """
        least = table_size(sequences, block_size)
        table = cls(capacity or least[0], max_blocks or least[1], block_size, device)
        table.refill(sequences)
        return table

    def refill(self, sequences: Sequence[DecodeRow]) -> None:
        """Replace the sequences: a captured graph reads the new ones in its next replay.

        Raises ValueError, and changes nothing, if they do not fit or if a sequence lacks a block.
        """
        if len(sequences) > self.capacity:
            raise ValueError(
                f"{len(sequences)} sequences do not fit in {self.capacity}: make the table with more capacity"
            )
        needed = [self._needed(s) for s in sequences]
        views = parts_of(self._staged.write(), self.capacity, self.max_blocks)
        counts, rows, lengths, blocks = (view.numpy() for view in views)
        counts[0] = len(sequences)
        for i, (sequence, count) in enumerate(zip(sequences, needed, strict=True)):
            rows[i], lengths[i] = sequence.row, sequence.length
            blocks[i, :count] = sequence.blocks[:count]
            # Padding, which is never read; it repeats a block of the sequence itself.
            blocks[i, count:] = sequence.blocks[count - 1]
        self._staged.send()

    def _needed(self, sequence: DecodeRow) -> int:
        count = -(-sequence.length // self.block_size)
        if sequence.length < 1:
            raise ValueError(f"a context of {sequence.length} tokens: leave the sequence out")
        if count > self.max_blocks:
            raise ValueError(
                f"a context of {sequence.length} tokens needs {count} blocks of {self.max_blocks}: make the table "
                "with more max_blocks"
            )
        if count > len(sequence.blocks):
            raise ValueError(
                f"a context of {sequence.length} tokens needs {count} blocks, its sequence has {len(sequence.blocks)}: "
                "give it its blocks first"
            )
        return count


class DecodeTables:
    """Decode tables of a few sizes (powers of two), each made once and refilled from then on."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size, self._device = block_size, device
        self._tables: dict[tuple[int, int], StagedDecodeTable] = {}

    def refill(self, sequences: Sequence[DecodeRow]) -> DecodeTable:
        """The table of the smallest size that holds these sequences, with them. Raises ValueError as it does."""
        size = table_size(sequences, self._block_size)
        if size not in self._tables:
            self._tables[size] = StagedDecodeTable(*size, self._block_size, self._device)
        self._tables[size].refill(sequences)
        return self._tables[size]


def table_words(capacity: int, max_blocks: int) -> int:
    """int32 words of a table."""
    return ALIGNED + 2 * aligned(capacity) + capacity * max_blocks


def parts_of(words: torch.Tensor, capacity: int, max_blocks: int) -> tuple[torch.Tensor, ...]:
    """counts, rows, lengths and blocks in the words of a table."""
    width, start = aligned(capacity), ALIGNED
    rows, lengths = words[start : start + capacity], words[start + width : start + width + capacity]
    blocks = words[start + 2 * width : start + 2 * width + capacity * max_blocks]
    return words[:1], rows, lengths, blocks.view(capacity, max_blocks)


def table_size(sequences: Sequence[DecodeRow], block_size: int) -> tuple[int, int]:
    """(capacity, max_blocks) that hold these sequences: the next powers of two."""
    blocks = max((-(-s.length // block_size) for s in sequences), default=1)
    return _power(len(sequences)), max(16, _power(blocks))


def _power(count: int) -> int:
    """The power of two that holds a count, at least 1."""
    return 1 << max(0, count - 1).bit_length()
