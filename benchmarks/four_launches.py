"""A rival: the usual four launches of public serving systems, base, zero-fill, shrink with float32 atomics, expand.

Sources: Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023) for the two products over segments; the launch sizes
that vLLM has for such kernels where there is no table for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from clif.kernels.dual_lora_host import INTERPRET
from clif.kernels.dual_lora_reference import MergedLinear, Segment
from clif.kernels.numerics import dot, rounded


@dataclass(frozen=True)
class RivalTiles:
    """Rows of a tile of either kernel, columns of a tile of y, and of the shrink the depth of a step and the slices."""

    shrink_m: int = 16
    expand_m: int = 16
    block_n: int = 128
    block_k: int = 128
    slices: int = 16
    stages: int = 3


OWN = RivalTiles()
"""Low tiles, which waste few rows of a short segment."""


def published(rows: int, members: int) -> RivalTiles:
    """The sizes of a public serving system. rows: of the batch; members: projections in one product."""
    short = rows < 128
    return RivalTiles(
        shrink_m=32,
        expand_m=64,
        block_n=64 if members > 1 else 128,
        block_k=256 if short else 32,
        slices=64 if short else 8,
        stages=2,
    )


@triton.jit
def shrink(
    x, a, hidden, tiles, depth, x_row, a_slot, RANKS: tl.constexpr, RANKS_P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """hidden [rows, RANKS] += a slice of x A^T, for one row tile."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0) // SLICES
    row, stop, slot = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rows, ranks = row + tl.arange(0, BLOCK_M), tl.arange(0, RANKS_P)
    acc = tl.zeros([BLOCK_M, RANKS_P], dtype=tl.float32)
    for k in range((tl.program_id(0) % SLICES) * BLOCK_K, depth, BLOCK_K * SLICES):
        ks = k + tl.arange(0, BLOCK_K)
        left = tl.load(
            x + rows[:, None] * x_row + ks[None, :], mask=(rows[:, None] < stop) & (ks[None, :] < depth), other=0.0
        )
        inside = (ks[:, None] < depth) & (ranks[None, :] < RANKS)
        right = tl.load(a + slot * a_slot + ranks[None, :] * depth + ks[:, None], mask=inside, other=0.0)
        acc = dot(left, right, acc, INTERPRET)
    inside = (rows[:, None] < stop) & (ranks[None, :] < RANKS)
    tl.atomic_add(hidden + rows[:, None] * RANKS + ranks[None, :], acc, mask=inside)


@triton.jit
def expand(
    hidden, b, y, tiles, columns, scale, y_row, b_slot, RANKS: tl.constexpr, RANK: tl.constexpr, RANK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y += scale * hidden B^T, for one tile of y, whose columns belong to one projection."""
    tile, column = tl.program_id(0), tl.program_id(1)
    row, stop, slot = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    col, end, first = (
        tl.load(columns + 3 * column), tl.load(columns + 3 * column + 1), tl.load(columns + 3 * column + 2)
    )  # fmt: skip
    rows, cols, ranks = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), tl.arange(0, RANK_P)
    inside = (ranks[:, None] < RANK) & (cols[None, :] < end)
    right = tl.load(b + slot * b_slot + cols[None, :] * RANKS + first + ranks[:, None], mask=inside, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    inside = (rows[:, None] < stop) & (ranks[None, :] < RANK)
    left = tl.load(hidden + rows[:, None] * RANKS + first + ranks[None, :], mask=inside, other=0.0)
    acc = dot(rounded(left, right.dtype, INTERPRET), right, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), INTERPRET)
    inside = (rows[:, None] < stop) & (cols[None, :] < end)
    address = y + rows[:, None] * y_row + cols[None, :]
    value = tl.load(address, mask=inside, other=0.0).to(tl.float32) + acc * scale
    tl.store(address, rounded(value, y.dtype.element_ty, INTERPRET), mask=inside)


class FourLaunches:
    """The four launches for batches of the same segments. The host knows them, so that every program has work.

    From compute capability 9.0 on the expand starts early, and waits for the shrink before it reads its result.
    """

    def __init__(self, merged: MergedLinear, segments: Sequence[Segment], tiles: RivalTiles = OWN) -> None:
        """merged: a layer like those that are computed."""
        self._sizes, self._device, slots = tiles, merged.weight.device, len(merged.a)
        self._early = self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) >= (9, 0)
        cuts = [(s.start, s.stop, s.slot % slots) for s in segments]
        self._shrunk, self._expanded = (self._cut(cuts, rows) for rows in (tiles.shrink_m, tiles.expand_m))
        members = [(m.start, m.stop, m.block * merged.r) for m in merged.projections if m.block is not None]
        self._columns = self._cut(members, tiles.block_n)

    def _cut(self, ranges: Sequence[tuple[int, int, int]], size: int) -> torch.Tensor:
        """(first, end, what it belongs to) of every tile."""
        found = [(at, min(at + size, stop), what) for start, stop, what in ranges for at in range(start, stop, size)]
        return torch.tensor(found, dtype=torch.int32, device=self._device)

    def __call__(self, merged: MergedLinear, x: torch.Tensor) -> torch.Tensor:
        """y [rows, out] of x [rows, in]."""
        y, sizes = linear(x, merged.weight, merged.bias), self._sizes
        ranks, depth = merged.a.shape[1], merged.weight.shape[1]
        # More slices than steps would be programs without work.
        slices = min(sizes.slices, triton.cdiv(depth, sizes.block_k))
        hidden = torch.zeros(len(x), ranks, dtype=torch.float32, device=x.device)
        options = {"EARLY": self._early, "INTERPRET": INTERPRET, "num_warps": 4, "num_stages": sizes.stages}
        shrink[(len(self._shrunk) * slices,)](
            x, merged.a, hidden, self._shrunk, depth, x.stride(0), merged.a.stride(0), RANKS=ranks,
            RANKS_P=_padded(ranks), BLOCK_M=sizes.shrink_m, BLOCK_K=sizes.block_k, SLICES=slices, **options,
        )  # fmt: skip
        expand[(len(self._expanded), len(self._columns))](
            hidden, merged.b, y, self._expanded, self._columns, merged.scale, y.stride(0), merged.b.stride(0),
            RANKS=ranks, RANK=merged.r, RANK_P=_padded(merged.r), BLOCK_M=sizes.expand_m, BLOCK_N=sizes.block_n,
            **options, **({"launch_pdl": True} if self._early else {}),
        )  # fmt: skip
        return y


def _padded(ranks: int) -> int:
    return max(16, triton.next_power_of_2(ranks))
