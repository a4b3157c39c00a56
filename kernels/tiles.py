"""Tile sizes of the dual LoRA kernels, which divide the work of one launch. Free of Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["fused", "pair", "three", "branches", "separate"]


@dataclass(frozen=True)
class LinearTiles:
    """How one shape of dual_lora_linear is computed.

    form: fused (one launch); pair (two: h, then y, the second starts early); three (torch's base product, one launch
    for h, one that adds the low-rank products); branches (the same, h on a side stream beside the base product); or
    separate (as three, but long segments by torch's products).
    group_m: row tiles that run close together; split: parts of the contraction of a tile of y; slices: of the one that
    makes h; shrinkers: programs for that; programs: the others, per multiprocessor; tma: load by tensor descriptors,
    store_tma: store y by one, too, where all column tiles are full; early: in three and separate the last launch starts
    while the one for h ends, and waits for it (the last three: compute capability 9.0 and up).
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
    store_tma: bool = False
    early: bool = False


@dataclass(frozen=True)
class GradTiles:
    """How one shape of dual_lora_grads is computed.

    block_c: columns of a tile; block_r: rows of a step; slices: parts of the rows; tma: load by tensor descriptors.
    """

    block_c: int = 128
    block_r: int = 64
    slices: int = 4
    warps: int = 4
    stages: int = 3
    tma: bool = False


def descriptor_boxes(tiles: LinearTiles, rank: int, transposed: bool) -> dict[str, tuple[int, int]]:
    """Shape of one load or store by tensor descriptor, for x, w, a, b and y of dual_lora_linear. rank: padded."""
    width = piece_width(tiles)
    boxes = {"w": (tiles.block_n, tiles.block_k), "a": (rank, tiles.block_k), "b": (width, rank)}
    if transposed:
        boxes = {name: box[::-1] for name, box in boxes.items()}
    return {"x": (tiles.block_m, tiles.block_k), **boxes, "y": (tiles.block_m, width)}


def piece_width(tiles: LinearTiles) -> int:
    """Columns of a tile of y that are completed at once."""
    sums = tiles.block_m * tiles.block_n
    return tiles.block_n // (4 if sums > 2 * PIECE else 2 if sums > PIECE else 1)


PIECE = 8192
"""Most sums of a tile of y for which the low-rank product is selected at once."""
