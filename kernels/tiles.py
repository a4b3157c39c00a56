"""How work is cut: tile sizes, and the tables that tell a kernel which rows and columns each of its tiles has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from clif.kernels.dual_lora import Member, Segment

Form = Literal["fused", "pair", "separate"]


@dataclass(frozen=True)
class LinearTiles:
    """How one shape of dual_lora_linear is computed.

    form: fused (one launch), pair (two, the second starts early), or separate: torch's products, one after the other.
    group_m: row tiles that run close together; split: parts of the contraction of a tile of y; slices: of the one that
    makes h; shrinkers: programs for that; programs: the others, per multiprocessor; tma: load by tensor descriptors
    (compute capability 9.0 and up).
    """

    form: Form = "fused"
    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    group_m: int = 8
    split: int = 1
    slices: int = 8
    shrinkers: int = 32
    programs: int = 1
    warps: int = 4
    stages: int = 4
    tma: bool = False


@dataclass(frozen=True)
class GradTiles:
    """How one shape of dual_lora_grads is computed. block_c: columns of a tile; block_r: rows of a step."""

    block_c: int = 128
    block_r: int = 64
    slices: int = 4
    warps: int = 4
    stages: int = 3


def descriptor_boxes(tiles: LinearTiles, rank: int, transposed: bool) -> dict[str, tuple[int, int]]:
    """What one load by tensor descriptor brings, for x, w, a and b of dual_lora_linear. rank: padded."""
    boxes = {"w": (tiles.block_n, tiles.block_k), "a": (rank, tiles.block_k), "b": (tiles.block_n, rank)}
    if transposed:
        boxes = {name: box[::-1] for name, box in boxes.items()}
    return {"x": (tiles.block_m, tiles.block_k), **boxes}


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


def column_tiles(members: Sequence[Member], block_n: int) -> list[tuple[int, int, int, int]]:
    """(first column, end, first block, end of blocks) of every tile of y; none crosses from one member to the next."""
    tiles = []
    for member in members:
        first, end = (0, 0) if member.block is None else (member.block, member.block + 1)
        tiles += [
            (col, min(col + block_n, member.stop), first, end) for col in range(member.start, member.stop, block_n)
        ]
    return tiles


def grad_tiles(members: Sequence[Member], block_c: int) -> list[tuple[int, int, int, int]]:
    """(first column, end, block, row of grad_b) of every tile of grad_b, which holds the adapted members only."""
    tiles, skipped = [], 0
    for member in members:
        if member.block is None:
            skipped += member.stop - member.start
            continue
        cols = range(member.start, member.stop, block_c)
        tiles += [(col, min(col + block_c, member.stop), member.block, col - skipped) for col in cols]
    return tiles


class RowTable:
    """Row tiles on the device. counts [2]: tiles, and those with an adapter; tiles [capacity, 3]."""

    def __init__(
        self, segments: Sequence[Segment], rows: int, block_m: int, slots: int, device: torch.device, capacity: int = 0
    ) -> None:
        """capacity: tiles that `refill` may need later, as a captured graph does."""
        self.block_m, self.slots = block_m, slots
        found, adapted = row_tiles(segments, rows, block_m, slots)
        self._words = _words(found, adapted, max(capacity, len(found), 1)).to(device, non_blocking=True)
        self.counts, self.tiles = self._words[:2], self._words[HEADER:].view(-1, 3)

    @property
    def capacity(self) -> int:
        """Tiles that there is room for."""
        return len(self.tiles)

    def refill(self, segments: Sequence[Segment], rows: int) -> None:
        """Other segments for the same launch: a captured graph reads them in its next replay.

        Raises ValueError if they need more tiles than there is room for.
        """
        found, adapted = row_tiles(segments, rows, self.block_m, self.slots)
        if len(found) > self.capacity:
            raise ValueError(f"{len(found)} row tiles do not fit in {self.capacity}: make the table with more capacity")
        self._words.copy_(_words(found, adapted, self.capacity), non_blocking=True)


HEADER = 16
"""Words before the tiles, so that these are aligned."""


def _words(found: Sequence[Sequence[int]], adapted: int, capacity: int) -> torch.Tensor:
    """Counts and tiles in one piece, where a GPU can fetch it while Python goes on."""
    padding = [0, 0, -1] * (capacity - len(found))
    values = [len(found), adapted, *[0] * (HEADER - 2), *itertools.chain.from_iterable(found), *padding]
    return torch.tensor(values, dtype=torch.int32, pin_memory=torch.cuda.is_available())
