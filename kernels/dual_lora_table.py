"""Tables on the device with the rows and columns of each tile of a dual LoRA kernel. Free of Triton."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from clif.kernels.dual_lora_reference import Projection, Segment
from clif.kernels.staging import Staged


def row_tiles(segments: Sequence[Segment], rows: int, block_m: int, slots: int) -> tuple[list[tuple[int, ...]], int]:
    """(first row, end, slot) of every row tile, those with an adapter first, and how many these are.

    Segments are disjoint and in row order; the rows between them have slot -1. A negative slot counts from the last.
    Raises ValueError for segments that overlap or leave the batch.
    """
    adapted: list[tuple[int, ...]] = []
    bare: list[tuple[int, ...]] = []
    at = 0
    for start, stop, slot in segments:
        if not at <= start <= stop <= rows:
            raise ValueError(f"segment {start}:{stop} overlaps the one before or leaves the batch of {rows} rows")
        if not -slots <= slot < slots:
            raise ValueError(f"segment {start}:{stop} wants slot {slot} of {slots}")
        bare += [(row, min(row + block_m, start), -1) for row in range(at, start, block_m)]
        adapted += [(row, min(row + block_m, stop), slot % slots) for row in range(start, stop, block_m)]
        at = stop
    bare += [(row, min(row + block_m, rows), -1) for row in range(at, rows, block_m)]
    return adapted + bare, len(adapted)


def column_tiles(projections: Sequence[Projection], block_n: int) -> list[tuple[int, int, int, int]]:
    """(first column, end, first block, end of blocks) of every tile of y; none spans two projections."""
    tiles = []
    for member in projections:
        first, end = (0, 0) if member.block is None else (member.block, member.block + 1)
        tiles += [
            (col, min(col + block_n, member.stop), first, end) for col in range(member.start, member.stop, block_n)
        ]
    return tiles


def grad_tiles(projections: Sequence[Projection], block_c: int) -> list[tuple[int, int, int, int]]:
    """(first column, end, block, row of grad_b) of every tile of grad_b, which holds the adapted members only."""
    tiles, skipped = [], 0
    for member in projections:
        if member.block is None:
            skipped += member.stop - member.start
            continue
        cols = range(member.start, member.stop, block_c)
        tiles += [(col, min(col + block_c, member.stop), member.block, col - skipped) for col in cols]
    return tiles


class RowTable:
    """Row tiles on the device, as the kernel reads them: views of `words`, which its owner fills with write_tiles().

    counts [2]: tiles, and those with an adapter; tiles [capacity, 3].
    """

    def __init__(self, words: torch.Tensor, block_m: int, slots: int) -> None:
        self.block_m, self.slots = block_m, slots
        self.counts, self.tiles = words[:2], words[HEADER:].view(-1, 3)

    @property
    def capacity(self) -> int:
        """Number of tiles that fit."""
        return len(self.tiles)


class StagedRowTable(RowTable):
    """A table with memory of its own."""

    def __init__(
        self, segments: Sequence[Segment], rows: int, block_m: int, slots: int, device: torch.device, capacity: int = 0
    ) -> None:
        """capacity: tiles that `refill` may need later, as a captured graph does."""
        found, adapted = row_tiles(segments, rows, block_m, slots)
        capacity = max(capacity, len(found), 1)
        self._staged = Staged.zeros(HEADER + 3 * capacity, torch.int32, device)
        super().__init__(self._staged.words, block_m, slots)
        self._send(found, adapted)

    def refill(self, segments: Sequence[Segment], rows: int) -> None:
        """Replace the segments: a captured graph reads the new ones in its next replay.

        Raises ValueError if they need more tiles than fit.
        """
        found, adapted = row_tiles(segments, rows, self.block_m, self.slots)
        if len(found) > self.capacity:
            raise ValueError(f"{len(found)} row tiles do not fit in {self.capacity}: make the table with more capacity")
        self._send(found, adapted)

    def _send(self, found: Sequence[Sequence[int]], adapted: int) -> None:
        """Counts and tiles in one tensor, pinned so that the copy to a GPU is asynchronous."""
        write_tiles(self._staged.write().numpy(), found, adapted)
        self._staged.send()


def write_tiles(words: Any, found: Sequence[Sequence[int]], adapted: int) -> None:
    """Write tiles and counts into the words [HEADER + 3 capacity] of a table, a numpy array; the rest is no tile."""
    values = [len(found), adapted, *[0] * (HEADER - 2), *itertools.chain.from_iterable(found)]
    words[: len(values)] = values
    words[len(values) :].reshape(-1, 3)[:] = NO_TILE


class AdapterTables(Protocol):
    """Where the kernel finds the row tiles of a batch, for layers of any tile height."""

    def of(self, block_m: int, slots: int) -> RowTable: ...


class RowTables:
    """The rows of one kind in each batch, cut for layers of any tile height; each table is made once and refilled.

    refill() sends all tables of the batch's size that exist, so that a forward meets tables that are ready.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[tuple[int, int, int], StagedRowTable] = {}
        self.segments: tuple[Segment, ...] = ()
        self.rows = self._size = 0

    def refill(self, segments: tuple[Segment, ...], rows: int) -> None:
        """The batch that comes next. Raises ValueError as RowTable does."""
        self.segments, self.rows, self._size = segments, rows, 1 << max(0, rows - 1).bit_length()
        for (size, _, _), table in self._tables.items():
            if size == self._size:
                table.refill(segments, rows)

    def of(self, block_m: int, slots: int) -> RowTable:
        """The table of this batch for tiles of so many rows."""
        key = (self._size, block_m, slots)
        if key not in self._tables:
            capacity = most_tiles(self._size, block_m, slots)
            self._tables[key] = StagedRowTable(self.segments, self.rows, block_m, slots, self._device, capacity)
        return self._tables[key]


def most_tiles(rows: int, block_m: int, slots: int) -> int:
    """Tiles of any batch of so many rows: each slot, and the rows without one, may end in a tile that is not full."""
    return rows // block_m + slots + 1


HEADER = 16
"""Words before the tiles, which aligns these."""
NO_TILE = (0, 0, -1)
