"""What the tuner measures, and in which order: shapes of 1B and 8B models, the most important first. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from checkout import use_checkout

use_checkout()

from clif.kernels.candidates import grads_candidates, linear_candidates
from clif.kernels.tile_file import LaunchShape, TileFile
from clif.kernels.tiles import GradTiles, LinearTiles

Tiles = LinearTiles | GradTiles
Lengths = tuple[tuple[int, int | None], ...]
SHADOW = -1
"""The slot of rows that learn, as in clif/kernels/dual_lora_reference.py, which needs torch."""
MODELS = {
    # Widths of the merged layers: query+key+value, output, gate+up, down.
    "8b": (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)),
    "1b": (((2048, 512, 512), 2048), ((2048,), 2048), ((8192, 8192), 2048), ((2048,), 8192)),
}
GOALS = (((4096,), 4096), ((2048,), 2048), ((1024,), 4096), ((4096, 1024, 1024), 4096))
"""Layers of the goals table: the first to be measured."""
LAYERS = tuple(dict.fromkeys((*GOALS, *MODELS["8b"], *MODELS["1b"])))
BATCHES: tuple[Lengths, ...] = (
    ((48, 0), (16, 1)),
    ((64, 0), (2048, SHADOW)),
    ((1, 0),),
    ((192, 0), (64, 1)),
    ((64, 0), (1984, SHADOW)),
    ((12, 0), (4, 1)),
)
"""Rows of each slot: decode steps as after a promotion, and 64 requests beside rows that learn."""
RANKS = (16, 8, 64)


@dataclass(frozen=True)
class Task:
    """One shape to measure. sizes: outputs of the members of the merged layer; what: which launches of it."""

    sizes: tuple[int, ...]
    depth: int
    r: int
    lengths: Lengths
    what: Literal["forward", "backward", "grads"]

    def shape(self) -> LaunchShape:
        rows, out = sum(count for count, _ in self.lengths), sum(self.sizes)
        if self.what == "backward":
            return LaunchShape(rows, out, self.depth, self.r, True)
        return LaunchShape(rows, self.depth, out, self.r, self.what == "grads")

    def __str__(self) -> str:
        rows = "+".join(str(count) for count, _ in self.lengths)
        return f"{self.what} {rows} rows {self.depth}->{'+'.join(map(str, self.sizes))} r={self.r}"


def tasks(dry: bool) -> Iterator[Task]:
    """All of them, the most important first; a rank of 8 after 16, whose results it uses (see candidates_of)."""
    if dry:
        yield from _of_layer(((32, 16), 32), 8, ((5, 0), (4, SHADOW)))
        return
    for r in RANKS:
        for lengths in BATCHES:
            for layer in LAYERS:
                yield from _of_layer(layer, r, lengths)


def _of_layer(layer: tuple[tuple[int, ...], int], r: int, lengths: Lengths) -> Iterator[Task]:
    yield Task(*layer, r, lengths, "forward")
    learns = sum(count for count, slot in lengths if slot == SHADOW)
    # One number of rows that learn: a table answers for the next larger one.
    if learns in (2048, 4):
        yield Task(*layer, r, ((learns, SHADOW),), "backward")
        yield Task(*layer, r, ((learns, SHADOW),), "grads")


@dataclass(frozen=True)
class Gpu:
    """programs: multiprocessors; capability: 90 = 9.0."""

    programs: int
    capability: int


def candidates_of(task: Task, gpu: Gpu, measured: TileFile) -> tuple[Tiles, ...]:
    """Tiles to measure, the simplest first.

    A rank of 8 is computed like one of 16, padded: the winners of 16, one of each form, are its candidates.
    """
    shape = task.shape()
    padded = replace(shape, rank=16)
    if shape.rank == 8 and task.what == "grads" and padded in measured.grads:
        return (measured.grads[padded].tiles,)
    if shape.rank == 8 and task.what != "grads" and padded in measured.linear:
        return tuple(measured.linear[padded].tiles.values())
    if task.what == "grads":
        return grads_candidates(shape.rows, shape.depth, shape.out, shape.rank, gpu.programs, gpu.capability)
    return linear_candidates(
        shape.rows, shape.depth, shape.out, shape.rank, shape.backward, gpu.programs, gpu.capability
    )


def first_of_each(candidates: tuple[Tiles, ...]) -> tuple[Tiles, ...]:
    """One candidate of each form, for a dry run, with few programs: the interpreter runs one after the other."""
    first = tuple({group_of(candidate): candidate for candidate in reversed(candidates)}.values())[::-1]
    return tuple(replace(c, shrinkers=2, slices=2) if isinstance(c, LinearTiles) else c for c in first)


def group_of(candidate: Tiles | str) -> str:
    """Whose best is kept for the last heat: each form's, and each of torch's ways (named by strings)."""
    if isinstance(candidate, str):
        return candidate
    return candidate.form if isinstance(candidate, LinearTiles) else "kernel"
