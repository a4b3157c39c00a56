"""Tables on the device with the rows and columns of each tile of the dual LoRA kernels. Free of Triton."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from clif.kernels.dual_lora_reference import Projection, Segment
from clif.kernels.staging import ALIGNED, Staged, aligned


class Pair(NamedTuple):
    """Rows [start, stop) of one segment within one row tile."""

    start: int
    stop: int
    slot: int
    tile: int


def row_pairs(segments: Sequence[Segment], rows: int, block_m: int, slots: int) -> tuple[list[int], list[Pair]]:
    """The pairs of (row tile, segment), and for each row tile where its own begin: firsts[t] to firsts[t + 1].

    A row tile is block_m rows of any slots. Segments are disjoint and in row order; the rows between them use no
    adapter and are in no pair. A negative slot counts from the last.
    Raises ValueError for segments that overlap or leave the batch.
    """
    assert_disjoint(segments, rows, slots)
    pairs: list[Pair] = []
    for start, stop, slot in segments:
        while start < stop:
            tile = start // block_m
            end = min((tile + 1) * block_m, stop)
            pairs.append(Pair(start, end, slot % slots, tile))
            start = end
    counts = Counter(pair.tile for pair in pairs)
    firsts = [0, *itertools.accumulate(counts[tile] for tile in range(tiles_of(rows, block_m)))]
    return firsts, pairs


def assert_disjoint(segments: Sequence[Segment], rows: int, slots: int) -> None:
    """Raises ValueError for segments that overlap, leave the batch or want a slot that does not exist."""
    at = 0
    for start, stop, slot in segments:
        if not at <= start <= stop <= rows:
            raise ValueError(f"segment {start}:{stop} overlaps the one before or leaves the batch of {rows} rows")
        if not -slots <= slot < slots:
            raise ValueError(f"segment {start}:{stop} wants slot {slot} of {slots}")
        at = stop


def tiles_of(rows: int, block_m: int) -> int:
    """Row tiles of a batch."""
    return -(-rows // block_m)


def most_pairs(rows: int, block_m: int, slots: int) -> int:
    """Pairs of any batch of so many rows with one segment for each slot: each may begin in the middle of a tile."""
    return tiles_of(rows, block_m) + slots


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
    """The pairs of a batch on the device, as the kernels read them: views of `words`, which write_pairs() fills.

    counts [1]: pairs; firsts [row tiles + 1]: where each row tile's pairs begin; pairs [capacity, 4]: first row, end,
    slot, row tile. All int32.
    """

    def __init__(self, words: torch.Tensor, rows: int, block_m: int, capacity: int) -> None:
        """words: table_words() of them. rows: the most of a batch; capacity: the most pairs."""
        self.block_m, self.rows = block_m, rows
        self.counts, self.firsts, self.pairs = table_parts(words, rows, block_m, capacity)

    @property
    def capacity(self) -> int:
        """Number of pairs that fit."""
        return len(self.pairs)

    def first(self, rows: int, capacity: int) -> RowTable:
        """A table for batches of fewer rows and pairs, in the same memory."""
        table = copy.copy(self)
        table.rows, table.pairs = rows, self.pairs[:capacity]
        table.firsts = self.firsts[: tiles_of(rows, self.block_m) + 1]
        return table


def table_parts(words: Any, rows: int, block_m: int, capacity: int) -> tuple[Any, Any, Any]:
    """counts, firsts and pairs in the words of a table, a tensor or a numpy array."""
    tiles = tiles_of(rows, block_m)
    start = ALIGNED + aligned(tiles + 1)
    return words[:1], words[ALIGNED : ALIGNED + tiles + 1], words[start : start + 4 * capacity].reshape(capacity, 4)


def table_words(rows: int, block_m: int, capacity: int) -> int:
    """int32 words of a table."""
    return aligned(ALIGNED + aligned(tiles_of(rows, block_m) + 1) + 4 * capacity)


def write_pairs(parts: tuple[Any, Any, Any], segments: Sequence[Segment], rows: int, block_m: int, slots: int) -> None:
    """Write a batch into the parts of a table, numpy arrays; row tiles behind the batch have no pairs.

    Raises ValueError, and writes nothing, if the segments are wrong or do not fit.
    """
    counts, firsts, pairs = parts
    own_firsts, own_pairs = row_pairs(segments, rows, block_m, slots)
    if len(own_pairs) > len(pairs) or len(own_firsts) > len(firsts):
        raise ValueError(
            f"{len(own_pairs)} pairs in {len(own_firsts) - 1} row tiles do not fit in {len(pairs)} and "
            f"{len(firsts) - 1}: make the table with more capacity"
        )
    counts[0] = len(own_pairs)
    firsts[: len(own_firsts)] = own_firsts
    firsts[len(own_firsts) :] = own_firsts[-1]
    if own_pairs:
        pairs[: len(own_pairs)] = own_pairs


class StagedRowTable(RowTable):
    """A table with memory of its own."""

    def __init__(
        self, segments: Sequence[Segment], rows: int, block_m: int, slots: int, device: torch.device, capacity: int = 0
    ) -> None:
        """capacity: pairs that `refill` may need later, as a captured graph does; by default those of a segment a slot.

        Raises ValueError as write_pairs does.
        """
        capacity = max(capacity, most_pairs(rows, block_m, max(slots, len(segments))))
        self._slots = slots
        self._staged = Staged.zeros(table_words(rows, block_m, capacity), torch.int32, device)
        super().__init__(self._staged.words, rows, block_m, capacity)
        self.refill(segments, rows)

    def refill(self, segments: Sequence[Segment], rows: int) -> None:
        """Replace the segments: a captured graph reads the new ones in its next replay.

        Raises ValueError as write_pairs does.
        """
        parts = table_parts(self._staged.write().numpy(), self.rows, self.block_m, self.capacity)
        write_pairs(parts, segments, rows, self.block_m, self._slots)
        self._staged.send()


@dataclass(frozen=True, eq=False)
class ColumnTable:
    """Column tiles on the device, or the ranges of the contraction that make each block of h.

    tiles [n, 4] or [n, 2], with first column and end in front; aligned: all begin and end at multiples of 16; full: all
    have the width for which they were cut.
    """

    tiles: torch.Tensor
    aligned: bool
    full: bool

    @classmethod
    def of(cls, tiles: Sequence[tuple[int, ...]], width: int, device: torch.device) -> ColumnTable:
        """The tiles as column_tiles() or grad_tiles() cut them, or ranges."""
        on_sixteen = all(first % 16 == stop % 16 == 0 for first, stop, *_ in tiles)
        full = all(stop - first == width for first, stop, *_ in tiles)
        return cls(torch.tensor(tiles, dtype=torch.int32, device=device), on_sixteen, full)


class AdapterTables(Protocol):
    """Where the kernels find the pairs of a batch, for layers of any tile height."""

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
            self._tables[key] = StagedRowTable((), self._size, block_m, slots, self._device)
            self._tables[key].refill(self.segments, self.rows)
        return self._tables[key]
