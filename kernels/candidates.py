"""Tiles worth measuring for one shape: a few dozen at most, of every form, chosen by arithmetic.

The tuner (benchmarks/tune_gpu.py) measures all of them, and the compile gate compiles all of them. Sizes of tiles are a
short list for each class of rows, so that layers of one model share compiled kernels: only what differs between shapes
without being compiled in (programs, shrinkers, widths) follows the shape, beside the parts of a contraction. Free of
Triton and torch.

What is left out in advance: tiles beyond the shared memory or the registers of a multiprocessor, tiles that leave
multiprocessors idle although others of the list do not, and contractions in parts too short to be pipelined.

Sources: Osama et al. 2023 (Stream-K): waves of tiles, and contractions in parts where there are few tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from clif.kernels.tiles import Form, GradTiles, LinearTiles, piece_width

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program can have, by compute capability (CUDA C++ Programming Guide, table of features)."""
MOST_SUMS = 128
"""Float32 sums of a thread for its tile: the other half of its registers is for addresses and operands."""
FULL = 0.8
"""Share of the multiprocessors that a launch must at least have work for, where any candidate has."""
MOST_WAVES = 4
MOST = 32
"""Candidates of one shape at most."""
AFTER_TORCH: tuple[Form, ...] = ("three", "branches", "separate")
"""Forms whose base product is torch's: the kernels only make h, and add what it gives."""


@dataclass(frozen=True)
class Sizes:
    """What is compiled into a kernel that computes tiles of y; the parts of the contraction follow the shape."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# Rows of a tile are at least those of a decode batch, so that W is read once; its columns are few, its stages deep: all
# multiprocessors together need about 4 MB on the way to saturate the memory of a Hopper GPU.
FEW = (Sizes(16, 128, 128, 4, 4), Sizes(16, 64, 128, 4, 5), Sizes(16, 32, 256, 4, 5), Sizes(16, 64, 256, 4, 4))
DECODE = (
    Sizes(64, 64, 64, 4, 6), Sizes(64, 64, 128, 4, 4), Sizes(64, 32, 128, 4, 5), Sizes(64, 128, 64, 4, 4),
    Sizes(64, 128, 128, 4, 3), Sizes(64, 256, 64, 4, 4),
)  # fmt: skip
BATCH = (
    Sizes(64, 64, 128, 4, 4), Sizes(64, 128, 64, 4, 4), Sizes(64, 256, 64, 4, 4), Sizes(128, 64, 64, 4, 4),
    Sizes(128, 128, 64, 8, 4), Sizes(128, 256, 64, 8, 3),
)  # fmt: skip
MANY = (
    Sizes(128, 256, 64, 8, 3), Sizes(128, 256, 64, 8, 4), Sizes(128, 128, 64, 8, 4), Sizes(128, 128, 64, 4, 4),
    Sizes(128, 128, 128, 8, 3), Sizes(256, 128, 64, 8, 3), Sizes(64, 256, 64, 4, 4),
)  # fmt: skip
# Without descriptors addresses take registers and copies take threads: smaller tiles, more warps.
PLAIN_FEW = (Sizes(16, 64, 64, 4, 4), Sizes(16, 32, 128, 4, 4), Sizes(16, 128, 64, 8, 3), Sizes(16, 64, 128, 4, 3))
PLAIN_DECODE = (
    Sizes(64, 64, 64, 8, 4), Sizes(64, 64, 32, 4, 5), Sizes(64, 32, 64, 4, 5), Sizes(64, 128, 32, 8, 4),
    Sizes(64, 128, 64, 8, 3),
)  # fmt: skip
PLAIN_MANY = (Sizes(128, 128, 32, 8, 3), Sizes(128, 128, 32, 8, 4), Sizes(64, 128, 64, 8, 3))
# For the forms that begin with torch's product: rows of a pair, columns of an expand tile, depth of the shrink.
THIN_FEW = (Sizes(16, 128, 128, 4, 3), Sizes(16, 64, 256, 4, 3), Sizes(16, 256, 128, 4, 4))
THIN_BATCH = (Sizes(16, 128, 128, 4, 3), Sizes(64, 64, 128, 4, 3), Sizes(64, 128, 64, 4, 4), Sizes(32, 128, 128, 4, 3))
THIN_MANY = (Sizes(64, 128, 128, 4, 3), Sizes(128, 128, 64, 8, 3), Sizes(64, 256, 64, 8, 3), Sizes(128, 64, 64, 4, 4))
GRADS = ((64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3))
"""Of the gradients of the factors: columns of a tile, rows of a step, warps, stages."""


@dataclass(frozen=True)
class Problem:
    """One shape on one type of GPU. rows of the batch, depth of the contraction; programs: multiprocessors."""

    rows: int
    depth: int
    out: int
    rank: int
    programs: int
    capability: int

    @property
    def tma(self) -> bool:
        """Whether tensor descriptors can load and store."""
        return self.capability >= 90

    @property
    def shared_bytes(self) -> int:
        known = [limit for capability, limit in SHARED_BYTES.items() if capability <= self.capability]
        return SHARED_BYTES.get(self.capability, known[-1] if known else 48 << 10)


def linear_candidates(
    rows: int, depth: int, out: int, rank: int, backward: bool, programs: int, capability: int
) -> tuple[LinearTiles, ...]:
    """Tiles for one shape of dual_lora_linear, the simplest form first, at most MOST.

    rows of the batch, depth of the contraction, outputs, rank of an adapter; programs: multiprocessors; capability: of
    the GPU, 90 = 9.0. backward: of rows that all use the shadow.
    """
    shape = Problem(rows, depth, out, rank, programs, capability)
    whole = tuple(_whole(shape))
    found = [*whole]
    if capability >= 90:
        # The second launch waits for the first with an instruction of Hopper.
        first = _best(shape, whole, 5 if rows <= 256 else 3)
        found += [replace(tiles, form="pair", shrinkers=programs) for tiles in first]
    thin = tuple(_thin(shape))
    forms: tuple[tuple[Form, int], ...] = (("three", len(thin)), ("branches", 3), ("separate", 2))
    for form, count in forms:
        found += [replace(tiles, form=form) for tiles in thin[:count]]
        if capability >= 90 and form == "three":
            found += [replace(tiles, early=True) for tiles in thin[:2]]
    return tuple(dict.fromkeys(found))[:MOST]


def first_choice(form: Form, rows: int, depth: int, out: int, rank: int, programs: int, capability: int) -> LinearTiles:
    """The candidate of this form that is taken where none was measured. Arguments as of linear_candidates.

    Few rows are limited by reading W: narrow tiles with many stages, and a contraction in four parts or more, so that
    every multiprocessor has loads under way all the time. With many rows whole waves count: 2112 rows and 4096 outputs
    are 2.06 waves of 128x256 tiles on 132 multiprocessors, which take the time of 3, and 4.0 of 64x256 tiles.
    """
    shape = Problem(rows, depth, out, rank, programs, capability)
    if form in AFTER_TORCH:
        return replace(next(_thin(shape)), form=form)
    whole = tuple(tiles for tiles in _whole(shape) if not tiles.store_tma)
    if rows > 256:
        (found,) = _best(shape, whole, 1)
    else:
        # B's part of a tile lies in registers beside the sums: 64 ranks of 128 columns do not fit.
        narrow = [tiles for tiles in whole if tiles.block_n * _padded(rank) <= 64 * 64] or whole
        busy = (tiles for tiles in narrow if tiles.split >= 4 and waves(shape, tiles) >= FULL)
        found = next(busy, narrow[0])
    return replace(found, form=form, shrinkers=programs if form == "pair" else found.shrinkers)


def waves(shape: Problem, tiles: LinearTiles) -> float:
    """How often the multiprocessors are filled by the parts of all tiles of y."""
    return tiles_of_y(shape, tiles) * tiles.split / shape.programs


def tiles_of_y(shape: Problem, tiles: LinearTiles) -> int:
    return -(-shape.rows // tiles.block_m) * -(-shape.out // tiles.block_n)


def shared_bytes(tiles: LinearTiles, rank: int) -> int:
    """Shared memory of one program at most, for a rank r.

    All stages of its contraction and a piece of y that a descriptor stores, or later both operands of depth r, which
    are loaded in stages, too, where they are all that is multiplied.
    """
    padded = _padded(rank)
    wide = padded if tiles.form in AFTER_TORCH else tiles.block_n
    contraction = tiles.stages * (tiles.block_m + wide) * tiles.block_k
    stored = tiles.block_m * piece_width(tiles) if tiles.store_tma else 0
    low_rank = (tiles.block_m + tiles.block_n) * padded * (tiles.stages if tiles.form in AFTER_TORCH else 1)
    return 2 * max(contraction + stored, low_rank) + 1024


def _whole(shape: Problem) -> Iterator[LinearTiles]:
    """For the forms that compute the base product: fused, and pair."""
    found = [tiles for sizes in _sizes(shape) for tiles in _divided(shape, sizes)]
    if not found:
        # Descriptors and little shared memory, as with compute capability 12.0: the smaller tiles of other GPUs.
        smaller = _sizes(replace(shape, capability=80))
        found = [tiles for sizes in smaller for tiles in _divided(shape, sizes)]
    most = max((waves(shape, tiles) for tiles in found), default=0.0)
    full = [tiles for tiles in found if waves(shape, tiles) >= min(FULL, most)]
    yield from full
    if shape.rows > 256 and shape.tma and shape.out % 256 == 0:
        # y is as large as x: with many rows the stores count. Beside the sums of other parts they spill registers.
        undivided = tuple(tiles for tiles in full if tiles.split == 1)
        yield from (replace(tiles, store_tma=True) for tiles in _best(shape, undivided, 4))


def _sizes(shape: Problem) -> tuple[Sizes, ...]:
    if shape.rows <= 16:
        return FEW if shape.tma else PLAIN_FEW
    if shape.rows <= 64:
        return DECODE if shape.tma else PLAIN_DECODE
    if shape.rows <= 256:
        return BATCH if shape.tma else (*PLAIN_DECODE, *PLAIN_MANY[:2])
    return MANY if shape.tma else PLAIN_MANY


def _divided(shape: Problem, sizes: Sizes) -> Iterator[LinearTiles]:
    """Tiles of these sizes, if a multiprocessor can hold them, with the contraction in as many parts as fill waves."""
    tiles = LinearTiles(
        block_m=sizes.block_m, block_n=sizes.block_n, block_k=sizes.block_k, warps=sizes.warps, stages=sizes.stages,
        slices=_slices(shape), shrinkers=_shrinkers(shape), tma=shape.tma,
    )  # fmt: skip
    bytes_of_one = shared_bytes(tiles, shape.rank)
    if bytes_of_one > shape.shared_bytes or sizes.block_m * sizes.block_n > MOST_SUMS * 32 * sizes.warps:
        return
    # Beside 128 rows of sums for each group of four warps those of other parts would be spilled, see compile_gate.
    # So would B's part of a wide tile: of few rows and a high rank, and of 64 rows where addresses take registers, too.
    crowded = sizes.block_n * (sizes.block_m == 16) * _padded(shape.rank) > 64 * 64
    if not shape.tma:
        crowded = (sizes.block_m, sizes.block_n) == (64, 128)
    whole = crowded or sizes.block_m > 16 * sizes.warps
    for split in (1,) if whole else _splits(shape, tiles):
        cut = replace(tiles, split=split)
        # Two programs hide each other's waiting, where there is work and memory for two.
        both = waves(shape, cut) > 1.1 and 2 * bytes_of_one <= shape.shared_bytes
        yield replace(cut, programs=2 if both else 1)


def _splits(shape: Problem, tiles: LinearTiles) -> list[int]:
    """Parts of a contraction: those that fill whole waves best (two for few rows), otherwise what comes nearest."""
    most = max(1, min(8 if shape.rows <= 256 else 2, shape.depth // (2 * tiles.block_k)))
    filled = {split: waves(shape, replace(tiles, split=split)) for split in (1, 2, 4, 8) if split <= most}
    full = [split for split, found in filled.items() if FULL <= found <= MOST_WAVES]
    # The least number of parts of equal ones: their sums have to be added.
    full.sort(key=lambda split: -round(filled[split] / math.ceil(filled[split]), 1))
    return full[: 2 if shape.rows <= 256 else 1] or [min(filled, key=lambda split: abs(filled[split] - 1))]


def _best(shape: Problem, candidates: tuple[LinearTiles, ...], count: int) -> list[LinearTiles]:
    """Those with the least work in the waves that they need, the last one counted as full; one for each size."""

    def work(tiles: LinearTiles) -> float:
        return (
            -(-tiles_of_y(shape, tiles) * tiles.split // shape.programs) * tiles.block_m * tiles.block_n / tiles.split
        )

    one_each: dict[Sizes, LinearTiles] = {}
    for tiles in sorted(candidates, key=work):
        one_each.setdefault(Sizes(tiles.block_m, tiles.block_n, tiles.block_k, tiles.warps, tiles.stages), tiles)
    return list(one_each.values())[:count]


def _slices(shape: Problem) -> int:
    """Parts of the contraction that makes h: the same for all layers of a class of rows, as it is compiled in."""
    return 2 if shape.rows > 256 else 16


def _shrinkers(shape: Problem) -> int:
    return 64 if shape.rows > 64 else 32


def _thin(shape: Problem) -> Iterator[LinearTiles]:
    """For the forms that begin with torch's base product: h, and what it adds to y."""
    # With many rows x is most of what a launch for h reads.
    tma, found = shape.tma and shape.rows > 256, []
    for sizes in THIN_FEW if shape.rows <= 16 else THIN_BATCH if shape.rows <= 256 else THIN_MANY:
        pairs = -(-shape.rows // sizes.block_m) + 1
        parts = max(1, min(32, shape.programs // pairs, shape.depth // sizes.block_k))
        tiles = LinearTiles(
            "three", sizes.block_m, sizes.block_n, sizes.block_k, slices=1 << round(math.log2(parts)),
            shrinkers=2 * shape.programs, warps=sizes.warps, stages=sizes.stages, tma=tma,
        )  # fmt: skip
        # B's part of a tile lies in registers, which without descriptors hold addresses, too.
        fits = shape.tma or sizes.block_n * _padded(shape.rank) <= 128 * 64
        if fits and shared_bytes(tiles, shape.rank) <= shape.shared_bytes:
            found.append(tiles)
    yield from found
    yield from (replace(tiles, tma=False) for tiles in found[:1] if tma)


def grads_candidates(
    rows: int, depth: int, out: int, rank: int, programs: int, capability: int
) -> tuple[GradTiles, ...]:
    """Tiles for one shape of dual_lora_grads: rows in as many slices as fill 2 to 8 waves."""
    limit, found = Problem(rows, depth, out, rank, programs, capability).shared_bytes, []
    for block_c, block_r, warps, stages in GRADS:
        targets = -(-depth // block_c) + -(-out // block_c)
        possible = [s for s in (1, 2, 4, 8, 16) if rows >= 2 * s * block_r] or [1]
        full = [s for s in possible if 2 * FULL <= targets * s / programs <= 8]
        if 2 * stages * block_r * (block_c + _padded(rank)) + 1024 <= limit:
            found += [GradTiles(block_c, block_r, s, warps, stages) for s in (full or possible[-1:])[:2]]
    if capability < 90:
        return tuple(found)
    return (*(replace(tiles, tma=True) for tiles in found), *found[:2])


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())
