"""Counts what a launch must move and compute, and the time that this takes at least. Free of Triton and of torch.

Counts are exact. A limit is the larger of bytes at the copy rate and operations at the rate of large products, both as
measured (`Machine`): a lower bound, never a prediction.

Sources: Williams et al. 2009 (the roofline model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from clif.kernels.tiles import LinearTiles, piece_width

Resource = Literal["memory", "arithmetic"]
PLANE = 4
"""Bytes of a partial sum."""


@dataclass(frozen=True)
class Machine:
    """Measured rates. copy_rate: bytes read and written a second; product_rate: bfloat16 operations a second."""

    name: str
    copy_rate: float
    product_rate: float
    multiprocessors: int


H200 = Machine("NVIDIA H200", 4.3e12, 790e12, 132)
"""The best rates of any run; those of 2026-11-27 copied 2.6 to 4.1 TB/s and multiplied at 772 TFLOP/s."""


@dataclass(frozen=True)
class Limit:
    """seconds: at least; resource: what takes so long."""

    seconds: float
    resource: Resource


def limit(moved: int, operations: int, machine: Machine = H200) -> Limit:
    """The least time for so many bytes from and to memory and so many operations."""
    memory, arithmetic = moved / machine.copy_rate, operations / machine.product_rate
    return Limit(memory, "memory") if memory >= arithmetic else Limit(arithmetic, "arithmetic")


@dataclass(frozen=True)
class LinearShape:
    """A merged linear layer and its batch.

    segments: rows of each adapter in the batch, in order; bare: rows after them that use none; outs: outputs of each
    projection, all of them adapted; element: bytes of a number.
    """

    segments: tuple[int, ...]
    depth: int
    outs: tuple[int, ...]
    rank: int
    bare: int = 0
    element: int = 2

    @property
    def rows(self) -> int:
        return sum(self.segments) + self.bare

    @property
    def out(self) -> int:
        return sum(self.outs)

    @property
    def hidden(self) -> int:
        """Columns of h."""
        return len(self.outs) * self.rank

    def pairs(self, block_m: int) -> list[tuple[int, int]]:
        """(first row, end) of the rows of one segment within one row tile."""
        found, at = [], 0
        for count in self.segments:
            stop = at + count
            while at < stop:
                end = min((at // block_m + 1) * block_m, stop)
                found.append((at, end))
                at = end
        return found


@dataclass(frozen=True)
class Work:
    """Counts of one launch. Bytes are those that its programs ask for; most repetitions come from a cache.

    items: independent parts of the work; programs: that run at the same time; operations: those that are needed;
    padded: those that the tensor cores do, with rows and columns that only fill up tiles.
    """

    name: str
    items: int
    programs: int
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    operations: int = 0
    padded: int = 0

    @property
    def waves(self) -> int:
        """Times that all programs take an item."""
        return -(-self.items // self.programs)

    @property
    def efficiency(self) -> float:
        """Items of the places that the waves have for them."""
        return self.items / (self.waves * self.programs)


def necessary(shape: LinearShape, adapted: bool = True) -> tuple[int, int]:
    """(bytes, operations) of a layer however it is computed: each operand read once, y written once."""
    numbers = shape.rows * (shape.depth + shape.out) + shape.out * shape.depth
    operations = 2 * shape.rows * shape.depth * shape.out
    if adapted:
        slots = sum(1 for rows in shape.segments if rows)
        numbers += slots * shape.rank * (len(shape.outs) * shape.depth + shape.out)
        operations += 2 * sum(shape.segments) * (shape.depth * shape.hidden + shape.rank * shape.out)
    return numbers * shape.element, operations


def necessary_backward(shape: LinearShape) -> tuple[int, int]:
    """(bytes, operations) of the gradients of x, A and B; x, h and that of y are read, factors' are float32."""
    rows, factors = shape.rows, shape.rank * (len(shape.outs) * shape.depth + shape.out)
    numbers = rows * (2 * shape.depth + shape.out + shape.hidden) + shape.out * shape.depth + factors
    thin = 2 * rows * (shape.depth * shape.hidden + shape.rank * shape.out)
    return numbers * shape.element + factors * PLANE, 2 * rows * shape.depth * shape.out + 2 * thin


def linear_work(shape: LinearShape, tiles: LinearTiles, machine: Machine = H200) -> list[Work]:
    """The launches of one forward, in order; those of cuBLAS with what they need at least, as one item.

    Raises ValueError for a form that it does not know.
    """
    if tiles.form in ("fused", "pair"):
        shrink, base = shrink_work(shape, tiles), base_work(shape, tiles, machine)
        return [_merged(shrink, base)] if tiles.form == "fused" else [shrink, base]
    if tiles.form in ("three", "branches"):
        return [cublas_work(shape), shrink_work(shape, tiles), expand_work(shape, tiles, machine)]
    raise ValueError(f"the launches of the form {tiles.form} depend on its segments: count them one by one")


def shrink_work(shape: LinearShape, tiles: LinearTiles) -> Work:
    """h = scale * x A^T of every pair: one item for each pair, projection and slice of the depth."""
    pairs, projections, padded_rank = shape.pairs(tiles.block_m), len(shape.outs), _padded(shape.rank)
    # The copy engine reads whole tiles, with rows of others; pointers are masked.
    heights = [min(tiles.block_m, shape.rows - a) if tiles.tma else b - a for a, b in pairs]
    items = len(pairs) * projections * tiles.slices
    planes = items * tiles.block_m * padded_rank * PLANE
    read = {
        "x": sum(heights) * projections * shape.depth * shape.element,
        "a": len(pairs) * shape.hidden * shape.depth * shape.element,
        "planes": planes,
    }
    hidden = sum(shape.segments) * shape.hidden * shape.element
    return Work(
        "shrink", items, max(1, min(tiles.shrinkers, items)), read, {"hidden": hidden, "planes": planes},
        2 * sum(shape.segments) * shape.depth * shape.hidden,
        2 * len(pairs) * projections * tiles.block_m * padded_rank * _up(shape.depth, tiles.block_k),
    )  # fmt: skip


def base_work(shape: LinearShape, tiles: LinearTiles, machine: Machine = H200) -> Work:
    """y = x W^T + h B^T: one item for each tile of y and part of the depth."""
    high, columns = -(-shape.rows // tiles.block_m), _columns(shape.outs, tiles.block_n)
    item_bytes = tiles.block_m * tiles.block_n * PLANE
    sums = high * columns * tiles.split * item_bytes if tiles.split > 1 else 0
    expand = expand_work(shape, tiles, machine)
    read = {
        "x": columns * shape.rows * shape.depth * shape.element,
        "w": high * shape.out * shape.depth * shape.element,
        "b": expand.read["b"],
        # A tile is completed in pieces of columns, and each piece loads h for itself.
        "hidden": expand.read["hidden"] * (tiles.block_n // piece_width(tiles)),
        "sums": sums,
    }
    padded = high * tiles.block_m * columns * tiles.block_n
    return Work(
        "base", high * columns * tiles.split, machine.multiprocessors * tiles.programs, read,
        {"y": shape.rows * shape.out * shape.element, "sums": sums},
        2 * shape.rows * shape.depth * shape.out + expand.operations,
        2 * padded * _up(shape.depth, tiles.block_k) + expand.padded,
    )  # fmt: skip


def expand_work(shape: LinearShape, tiles: LinearTiles, machine: Machine = H200) -> Work:
    """y += h B^T on the rows of every pair: one item for each pair and tile of columns."""
    pairs, adapted = shape.pairs(tiles.block_m), sum(shape.segments)
    items = len(pairs) * _columns(shape.outs, tiles.block_n)
    y = adapted * shape.out * shape.element
    read = {
        "y": y,
        "b": len(pairs) * shape.out * shape.rank * shape.element,
        "hidden": sum(-(-out // tiles.block_n) for out in shape.outs) * adapted * shape.rank * shape.element,
    }
    return Work(
        "expand", items, machine.multiprocessors * tiles.programs, read, {"y": y},
        2 * adapted * shape.rank * shape.out, 2 * items * tiles.block_m * tiles.block_n * _padded(shape.rank),
    )  # fmt: skip


def cublas_work(shape: LinearShape) -> Work:
    """The base product of another library: what it cannot do without."""
    read = {"x": shape.rows * shape.depth * shape.element, "w": shape.out * shape.depth * shape.element}
    operations = 2 * shape.rows * shape.depth * shape.out
    return Work("cuBLAS", 1, 1, read, {"y": shape.rows * shape.out * shape.element}, operations, operations)


def _merged(shrink: Work, base: Work) -> Work:
    """One launch whose first programs shrink: its waves are those of the tiles of y."""

    def sums(one: dict[str, int], two: dict[str, int]) -> dict[str, int]:
        return {name: one.get(name, 0) + two.get(name, 0) for name in {**one, **two}}

    return Work(
        "fused", base.items, base.programs, sums(shrink.read, base.read), sums(shrink.written, base.written),
        shrink.operations + base.operations, shrink.padded + base.padded,
    )  # fmt: skip


def paged_decode_bytes(lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, element: int = 2,
                       kv_element: float = 2) -> int:  # fmt: skip
    """Bytes of one layer's attention of one token per sequence: its keys and values, q and the result, each once."""
    kept = 2 * sum(lengths) * kv_heads * head_dim * kv_element
    return round(kept) + 2 * len(lengths) * heads * head_dim * element


def add_rms_norm_bytes(rows: int, width: int, element: int = 2) -> int:
    """Bytes of the sum of a residual and its norm: both parts, the sum and the result, and the weight."""
    return (4 * rows + 1) * width * element


def rotate_heads_bytes(rows: int, heads: int, kv_heads: int, head_dim: int, element: int = 2) -> int:
    """Bytes of a rotation: query, key and value, both tables of angles; query, key; key and value in the cache."""
    read, written = heads + 2 * kv_heads + 2, heads + 3 * kv_heads
    return rows * (read + written) * head_dim * element


def swiglu_bytes(rows: int, width: int, element: int = 2) -> int:
    """Bytes of silu(gate) * up: gate, up, and the result."""
    return 3 * rows * width * element


def _columns(outs: Sequence[int], block_n: int) -> int:
    """Column tiles: none spans two projections."""
    return sum(-(-out // block_n) for out in outs)


def _padded(rank: int) -> int:
    """The rank of a product on tensor cores: a power of two of at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
