"""A rival: the usual four launches of public serving systems, base, zero-fill, shrink with float32 atomics, expand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from clif.kernels.dual_lora_host import INTERPRET
from clif.kernels.dual_lora_reference import MergedLinear
from clif.kernels.dual_lora_table import RowTable
from clif.kernels.numerics import dot, rounded

BLOCK_M, BLOCK_N, BLOCK_K, SLICES = 16, 128, 128, 16


@triton.jit
def shrink(
    x, a, hidden, tiles, depth, x_row, a_slot, RANKS: tl.constexpr, RANKS_P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """hidden [rows, RANKS] += a slice of x A^T, for one row tile."""
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
    hidden, b, y, tiles, out, scale, y_row, b_slot, RANKS: tl.constexpr, RANKS_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y += scale * hidden B^T, for one tile of y."""
    tile = tl.program_id(0)
    row, stop, slot = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rows, ranks = row + tl.arange(0, BLOCK_M), tl.arange(0, RANKS_P)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < stop) & (ranks[None, :] < RANKS)
    left = tl.load(hidden + rows[:, None] * RANKS + ranks[None, :], mask=inside, other=0.0)
    inside = (ranks[:, None] < RANKS) & (cols[None, :] < out)
    right = tl.load(b + slot * b_slot + cols[None, :] * RANKS + ranks[:, None], mask=inside, other=0.0)
    acc = dot(rounded(left, right.dtype, INTERPRET), right, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), INTERPRET)
    inside = (rows[:, None] < stop) & (cols[None, :] < out)
    address = y + rows[:, None] * y_row + cols[None, :]
    value = tl.load(address, mask=inside, other=0.0).to(tl.float32) + acc * scale
    tl.store(address, rounded(value, y.dtype.element_ty, INTERPRET), mask=inside)


def four_launches(merged: MergedLinear, x: torch.Tensor, rows: RowTable, adapted: int) -> torch.Tensor:
    """y [rows, out]. adapted: how many of the row tiles have an adapter."""
    y = linear(x, merged.weight, merged.bias)
    ranks, (out, depth) = merged.a.shape[1], merged.weight.shape
    ranks_p = max(16, triton.next_power_of_2(ranks))
    hidden = torch.zeros(len(x), ranks, dtype=torch.float32, device=x.device)
    shrink[(adapted * SLICES,)](
        x, merged.a, hidden, rows.tiles, depth, x.stride(0), merged.a.stride(0), RANKS=ranks, RANKS_P=ranks_p,
        BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, SLICES=SLICES, INTERPRET=INTERPRET,
    )  # fmt: skip
    expand[(adapted, triton.cdiv(out, BLOCK_N))](
        hidden, merged.b, y, rows.tiles, out, merged.scale, y.stride(0), merged.b.stride(0), RANKS=ranks,
        RANKS_P=ranks_p, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, INTERPRET=INTERPRET,
    )  # fmt: skip
    return y
