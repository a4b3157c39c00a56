"""The cache blocks of each sequence of a decode batch, on the device. Free of Triton."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch

from clif.kernels.staging import ALIGNED, Staged, aligned


class DecodeRow(NamedTuple):
    """One sequence: its row in the batch, its tokens in the cache (the new one included), and its blocks in order."""

    row: int
    length: int
    blocks: Sequence[int]


class DecodeTable:
    """The sequences of a decode batch on the device, as the kernel reads them.

    counts [1]: sequences; rows and lengths [capacity], where a length of 0 leaves a sequence out; blocks [capacity,
    max_blocks], each row padded with its last block. All int32, all views of one tensor `words`, which its owner fills.
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
