"""The tiles of each shape: a measured table per type of GPU (`make tune-gpu` writes it), and reasoned defaults.

Nothing is tuned while serving. A shape that was measured may have the form "separate": torch's own products were
faster there. Free of Triton.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clif.kernels.tile_file import LaunchShape, TileFile
from clif.kernels.tiles import Form, GradTiles, LinearTiles

TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Defaults:
    """Tiles by reasoning, for unmeasured shapes. programs: multiprocessors; capability: of the GPU, 90 = 9.0.

    Few rows: tiles and parts of the depth, so that every multiprocessor reads a part of W. Many rows: tiles that
    reuse what they read, as large as the registers hold (see compile_gate).
    """

    programs: int = 132
    capability: int = 90

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles:
        tma = self.capability >= 90
        if rows > 256:
            block_n = 256 if tma and out >= 4096 else 128
            return LinearTiles(
                block_m=128, block_n=block_n, block_k=64 if tma else 32, slices=2, warps=8, stages=3, tma=tma
            )
        block_m = 16 if rows <= 16 else 64
        block_n = 128 if out >= 4096 and tma else 64 if block_m == 64 or tma else 32
        # Shared memory for two programs on a multiprocessor: shrinkers run beside the others.
        tall, block_k = -(-rows // block_m), 128 if block_m == 16 and tma else 64
        # Every program reads all of its rows of x: few columns of programs, each with a part of the depth, read less.
        most = max(1, min(self.programs // (tall * -(-out // block_n)), depth // (4 * block_k), 8))
        split, slices = 1 << (most.bit_length() - 1), max(1, min(32 // tall, depth // block_k))
        # Addresses take registers, which descriptors do not: without descriptors more threads share them.
        warps = 4 if tma else 8
        return LinearTiles(
            block_m=block_m, block_n=block_n, block_k=block_k, split=split, slices=slices, warps=warps, tma=tma
        )

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles:
        return GradTiles(block_c=64, slices=max(1, min(8, rows // 256)))


@dataclass(frozen=True)
class Fixed:
    """The same tiles for every shape: for tests, and to find better ones."""

    tiles: LinearTiles = LinearTiles()
    of_factors: GradTiles = GradTiles()

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles:
        return self.tiles

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles:
        return self.of_factors


@dataclass(frozen=True)
class TileTable:
    """Measured tiles; `missing` answers for shapes that are not in it (None: torch's products)."""

    measured: dict[LaunchShape, LinearTiles]
    gradients: dict[LaunchShape, GradTiles]
    missing: Defaults | None
    fallback: Defaults = Defaults()

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles:
        found = _nearest(self.measured, LaunchShape(rows, depth, out, rank, backward))
        if found is not None:
            return found
        return self.missing.linear(rows, depth, out, rank, backward) if self.missing else LinearTiles(form="separate")

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles:
        found = _nearest(self.gradients, LaunchShape(rows, depth, out, rank, True))
        return found if found is not None else self.fallback.grads(rows, depth, out, rank)


def _nearest(entries: dict[LaunchShape, Any], wanted: LaunchShape) -> Any:
    """The entry with the fewest rows that suffice, otherwise with the most; None if the other numbers differ."""
    like = [
        s
        for s in entries
        if (s.depth, s.out, s.rank, s.backward) == (wanted.depth, wanted.out, wanted.rank, wanted.backward)
    ]
    enough = [s for s in like if s.rows >= wanted.rows]
    best = min(enough, key=lambda s: s.rows) if enough else max(like, key=lambda s: s.rows, default=None)
    return None if best is None else entries[best]


def table_path(device: str) -> Path:
    """File of the table of a GPU with this name."""
    return TUNED / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def load_table(
    path: Path, missing: Defaults | None, fallback: Defaults, captured: bool = False, form: Form | None = None
) -> TileTable:
    """The fastest form of every shape; captured: of those whose segments are data, as in a captured step.

    form: that one alone, where it was measured. Raises ValueError for a file that is not such a table, naming it.
    """
    found = TileFile.read(path)
    linear = {}
    for shape, entry in found.linear.items():
        wanted = form or (entry.captured if captured else entry.chosen)
        if wanted in entry.tiles:
            linear[shape] = entry.tiles[wanted]
    return TileTable(linear, {shape: entry.tiles for shape, entry in found.grads.items()}, missing, fallback)
