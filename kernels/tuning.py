"""The tiles of each shape: a measured table per type of GPU (`make tune-gpu` writes it), and reasoned defaults.

Nothing is tuned while serving. Free of Triton and torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

from clif.kernels.candidates import first_choice
from clif.kernels.paged_decode_config import DecodeConfig, DecodeShape
from clif.kernels.tile_file import LaunchShape, TileFile
from clif.kernels.tiles import Form, GradTiles, LinearTiles

T = TypeVar("T")
TUNED = Path(__file__).parent / "tuned"
FEW, MANY, THIN = 4, 724, 32
"""Rows and ranks up to which a shape is nearer, as a ratio, to the smaller of two that were measured: 1 and 16 rows,
256 and 2048 rows, r=16 and r=64."""
_first_choice = lru_cache(4096)(first_choice)
"""It is asked for at every launch, and prompts have any number of rows."""


@dataclass(frozen=True)
class Defaults:
    """Form and tiles of shapes that were not measured on this type of GPU: the form by what one H200 measured.

    programs: multiprocessors; capability: of the GPU, 90 = 9.0; captured: segments are data, which rules the form
    `separate` out.
    """

    programs: int = 132
    capability: int = 90
    captured: bool = False

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles:
        form, _ = self.form(rows, rank, backward)
        return self.tiles(form, rows, depth, out, rank)

    def form(self, rows: int, rank: int, backward: bool) -> tuple[Form, str]:
        """The form, and why. Microseconds of an H200, 2026-11-27, replays of graphs, layers of 4096x4096.

        `three` had not been measured then: its place has the form of four launches, which are the same and a zero fill.
        `separate` had one more pass per segment. `branches` is taken where a table says so, and never by rule.
        """
        found: tuple[Form, str]
        if backward:
            found = (
                "separate",
                "1984 rows, r=16: 117 by torch's products, 114 in one tuned kernel; "
                "2048x2048: 43, 51; 1024->4096: 49, 40",
            )
        elif rows <= FEW:
            found = "fused", "1 row, r=16: 18.7 in one kernel, 20.1 in four launches; r=64: 20.5 and 21.6"
        elif rows <= MANY:
            found = (
                "three",
                "16, 64, 256 rows, r=16: 21.0, 19.6, 25.4 in four launches, 27.0, 26.9, 31.1 in one",
            )
        elif rank <= THIN:
            found = "three", "64+1984 rows, r=16: 117 in four launches, 129 by torch's products, 140 in one kernel"
        else:
            found = "separate", "64+1984 rows, r=64: 130 by torch's products, 140 in four launches, 156 in one kernel"
        return ("three", f"{found[1]}; segments are data") if self.captured and found[0] == "separate" else found

    def tiles(self, form: Form, rows: int, depth: int, out: int, rank: int) -> LinearTiles:
        """Tiles of a form, by reasoning."""
        return _first_choice(form, rows, depth, out, rank, self.programs, self.capability)

    def takes(self, depth: int, out: int, rank: int) -> bool:
        return True

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles:
        return GradTiles(block_c=64, slices=max(1, min(8, rows // 256)))


@dataclass(frozen=True)
class Fixed:
    """The same tiles for every shape: for tests, and to find better ones."""

    tiles: LinearTiles = LinearTiles()
    of_factors: GradTiles = GradTiles()

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles:
        return self.tiles

    def takes(self, depth: int, out: int, rank: int) -> bool:
        return True

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles:
        return self.of_factors


@dataclass(frozen=True)
class TileTable:
    """Measured tiles; `missing` answers for shapes that are not in it.

    everywhere: layers are taken of which it has no shape, too.
    """

    measured: dict[LaunchShape, LinearTiles]
    gradients: dict[LaunchShape, GradTiles]
    missing: Defaults
    everywhere: bool = True

    def takes(self, depth: int, out: int, rank: int) -> bool:
        return self.everywhere or (depth, out, rank, False) in self._linear

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles:
        found = _nearest(self._linear.get((depth, out, rank, backward), ()), rows)
        return found if found is not None else self.missing.linear(rows, depth, out, rank, backward)

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles:
        found = _nearest(self._grads.get((depth, out, rank, True), ()), rows)
        return found if found is not None else self.missing.grads(rows, depth, out, rank)

    # Every launch asks, and a table has some hundred shapes.
    @cached_property
    def _linear(self) -> dict[tuple[int, int, int, bool], list[tuple[int, LinearTiles]]]:
        return _by_rows(self.measured)

    @cached_property
    def _grads(self) -> dict[tuple[int, int, int, bool], list[tuple[int, GradTiles]]]:
        return _by_rows(self.gradients)


def _by_rows(entries: Mapping[LaunchShape, T]) -> dict[tuple[int, int, int, bool], list[tuple[int, T]]]:
    """(rows, entry), in the order of rows, by all other numbers of a shape."""
    found: dict[tuple[int, int, int, bool], list[tuple[int, T]]] = {}
    for shape in sorted(entries, key=lambda s: s.rows):
        of_others = found.setdefault((shape.depth, shape.out, shape.rank, shape.backward), [])
        of_others.append((shape.rows, entries[shape]))
    return found


def _nearest(entries: Sequence[tuple[int, T]], rows: int) -> T | None:
    """The entry with the fewest rows that suffice, otherwise with the most; None if there is none."""
    enough = (entry for most, entry in entries if most >= rows)
    return next(enough, entries[-1][1] if entries else None)


def table_path(device: str) -> Path:
    """File of the table of a GPU with this name."""
    return TUNED / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def load_table(path: Path, missing: Defaults, form: Form | None = None, everywhere: bool = True) -> TileTable:
    """The fastest form of every shape: in captured steps of those whose segments are data, in others of one stream.

    form: that one alone, where it was measured. everywhere: see TileTable. Raises ValueError for a file that is not
    such a table, naming it.
    """
    found = TileFile.read(path)
    linear = {}
    for shape, entry in found.linear.items():
        wanted = form or (entry.captured if missing.captured else entry.eager)
        if wanted in entry.tiles:
            linear[shape] = entry.tiles[wanted]
    return TileTable(linear, {shape: entry.tiles for shape, entry in found.grads.items()}, missing, everywhere)


def load_decode(path: Path) -> dict[DecodeShape, DecodeConfig]:
    """The measured splits of the paged decode kernel; none if there is no such file. Raises ValueError, as above."""
    return {shape: entry.config for shape, entry in TileFile.read(path).decode.items()} if path.is_file() else {}
