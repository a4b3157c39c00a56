"""The forms of a dual LoRA linear layer, and one object per merged layer that computes by them.

A form is a way to compute y = x W^T + bias + h B_s^T with h = scale * x A_s^T, forward; or, with W, A and B transposed,
the gradient of x. All forms compute the same function. In the forms that begin with torch's base product, rows without
adapter have the bits of that product; in those of one kernel, the bits of a launch whose table has no pairs. A batch of
which the host knows that no row has an adapter is the base product alone in every form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import MergedLinear, Segment
from clif.kernels.dual_lora_table import (
    ColumnTable,
    RowTable,
    RowTables,
    assert_disjoint,
    column_tiles,
    grad_tiles,
)
from clif.kernels.tiles import Form, LinearTiles

LONG = 512
"""Rows from which the form `separate` computes a segment by torch's products, two launches of its own. By reasoning:
128-row tiles of 512 rows and 4096 outputs just fill a GPU. `make tune-gpu` compares the form as a whole."""


@dataclass(frozen=True, eq=False)
class Call:
    """One layer, one batch, one direction: what a form computes from.

    x [rows, depth]; weight [out, depth]; bias [out] or None; a [slots, k r, depth] and b [slots, out, k r], any
    strides; hidden [rows, k r], to be filled with h. columns: tiles of y; blocks: range of the contraction of each
    block of h. product: of x with weight and bias, however these are stored. wanted: whether y is, beside h. segments:
    rows with an adapter, or their table on the device; tables: of these segments, if there are some already.
    """

    launcher: KernelLauncher
    tiles: LinearTiles
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    hidden: torch.Tensor
    columns: ColumnTable
    blocks: ColumnTable
    r: int
    scale: float
    product: Callable[[torch.Tensor], torch.Tensor]
    wanted: bool
    segments: Sequence[Segment] | RowTable
    tables: RowTables | None = None

    def table(self, segments: Sequence[Segment] | RowTable) -> RowTable:
        """The pairs of these segments on the device."""
        height, slots = self.tiles.block_m, len(self.a)
        if isinstance(segments, RowTable):
            if segments.block_m != height:
                raise ValueError(
                    f"a table of {segments.block_m}-row tiles does not fit {height}-row ones: make it for these"
                )
            return segments
        if self.tables is not None and segments is self.segments:
            return self.tables.of(height, slots)
        return self.launcher.rows(segments, len(self.x), height, slots)

    def base(self) -> torch.Tensor | None:
        """The base product by itself."""
        return self.product(self.x) if self.wanted else None

    def kernel(self, rows: RowTable, y: torch.Tensor | None) -> None:
        """Fill hidden and y, or hidden alone, in one launch or a pair of them."""
        self.launcher.linear(
            self.tiles, self.x, self.weight, self.bias, self.a, self.b, self.hidden, y, rows, self.columns, self.blocks,
            self.r, self.scale,
        )  # fmt: skip

    def expand(self, rows: RowTable, y: torch.Tensor | None) -> None:
        """Add h B_s^T to y in one launch."""
        if y is not None:
            self.launcher.expand(self.tiles, self.hidden, self.b, y, rows, self.columns, self.r)

    def by_products(self, segment: Segment, y: torch.Tensor | None) -> None:
        """h and y of one segment by two of torch's products, the scale within the first."""
        start, stop, slot = segment
        hidden = self.hidden[start:stop]
        # With beta=0 nothing of what lies there is read, a NaN included.
        hidden.addmm_(self.x[start:stop], self.a[slot].T, beta=0, alpha=self.scale)
        if y is not None:
            y[start:stop].addmm_(hidden, self.b[slot].T)


def _one_kernel(call: Call) -> torch.Tensor | None:
    rows = call.table(call.segments)
    y = call.x.new_empty(len(call.x), len(call.weight)) if call.wanted else None
    call.kernel(rows, y)
    return y


def _three_launches(call: Call) -> torch.Tensor | None:
    rows = call.table(call.segments)
    y = call.base()
    call.kernel(rows, None)
    call.expand(rows, y)
    return y


def _two_branches(call: Call) -> torch.Tensor | None:
    rows = call.table(call.segments)
    y = call.launcher.side.beside(call.base, partial(call.kernel, rows, None))
    call.expand(rows, y)
    return y


def _long_ones_apart(call: Call) -> torch.Tensor | None:
    if isinstance(call.segments, RowTable):
        raise ValueError("the form 'separate' needs segments that the host knows, not a table: take 'three'")
    assert_disjoint(call.segments, len(call.x), len(call.a))
    short = tuple(s for s in call.segments if s.stop - s.start < LONG)
    y = call.base()
    for segment in call.segments:
        if segment.stop - segment.start >= LONG:
            call.by_products(segment, y)
    if short:
        rows = call.table(call.segments if len(short) == len(call.segments) else short)
        call.kernel(rows, None)
        call.expand(rows, y)
    return y


FORMS: Mapping[Form, Callable[[Call], torch.Tensor | None]] = {
    "fused": _one_kernel,
    "pair": _one_kernel,
    "three": _three_launches,
    "branches": _two_branches,
    "separate": _long_ones_apart,
}
"""How each form computes, forward and backward. Returns y [rows, out], None unless wanted; hidden is filled."""


class DualLoraLinear:
    """One merged layer: forward for rows of any slots, backward for rows of the shadow."""

    def __init__(self, merged: MergedLinear, launcher: KernelLauncher) -> None:
        self.merged, self._launcher = merged, launcher
        out, depth = merged.weight.shape
        adapted = [m for m in merged.projections if m.block is not None]
        self._outputs = sum(m.stop - m.start for m in adapted)
        self._forward_blocks = ColumnTable.of([(0, depth)] * merged.blocks, depth, merged.weight.device)
        self._backward_blocks = ColumnTable.of([(m.start, m.stop) for m in adapted], out, merged.weight.device)
        self._columns: dict[tuple[Callable[..., Any], int], ColumnTable] = {}

    def held(self) -> tuple[object, ...]:
        """The tables that its launches have read so far, for a captured graph to keep."""
        return self._launcher.held()

    def forward(
        self, x: torch.Tensor, segments: Sequence[Segment] | RowTable, tables: RowTables | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y [rows, out] and h = scale * x A^T [rows, k r] of x [rows, in]; rows in no segment have no h.

        tables: of these segments; without them tables are made and kept for segments that come again. A table instead
        of segments is for a captured graph: refilled, it serves others in the next replay. Raises ValueError for
        segments that overlap, or a table made for other tiles.
        """
        p, x = self.merged, _rows(x)
        hidden = x.new_empty(len(x), p.a.shape[1])
        if not len(x):
            return x.new_empty(0, len(p.weight)), hidden
        if not isinstance(segments, RowTable) and not any(stop != start for start, stop, _ in segments):
            return p.forward(x), hidden
        tiles = self._tiles(len(x))
        columns = self._cut(column_tiles, p.projections, tiles.block_n)
        y = FORMS[tiles.form](
            Call(
                self._launcher, tiles, x, p.weight, p.bias, p.a, p.b, hidden, columns, self._forward_blocks, p.r,
                p.scale, p.forward, True, segments, tables,
            )
        )  # fmt: skip
        assert y is not None
        return y, hidden

    def height(self, rows: int) -> int:
        """Rows of a tile in the forward of so many rows: a table of that height fits."""
        return self._tiles(rows).block_m

    def _tiles(self, rows: int) -> LinearTiles:
        out, depth = self.merged.weight.shape
        return self._of_shape(rows, depth, out, False)

    def _of_shape(self, rows: int, depth: int, out: int, backward: bool) -> LinearTiles:
        """The tiles of a shape, in a form that begins with the base product where a weight is not dense."""
        tiles = self._launcher.tiling.linear(rows, depth, out, self.merged.r, backward)
        dense = self.merged.base is None or tiles.form not in ("fused", "pair")
        return tiles if dense else replace(tiles, form="three")

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor, down: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Gradients of x (None unless down), A [k r, in] and B [adapted outputs, r] of rows that use the shadow.

        grad: of y [rows, out]; x and hidden as in the forward. Those of the factors are float32.
        """
        p, grad, x, hidden = self.merged, _rows(grad), _rows(x), hidden.contiguous()
        if not len(x):
            zeros = torch.zeros_like(p.a[-1], dtype=torch.float32), x.new_zeros(self._outputs, p.r, dtype=torch.float32)
            return (torch.empty_like(x) if down else None), *zeros
        grad_x, grad_hidden = self.through(grad, down)
        return grad_x, *self.factor_gradients(grad, x, hidden, grad_hidden)

    def factor_gradients(
        self, grad: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor, grad_hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The backward's last launch: gradients of A and B."""
        p = self.merged
        out, depth = p.weight.shape
        tiles = self._launcher.tiling.grads(len(x), depth, out, p.r)
        columns = self._cut(grad_tiles, p.projections, tiles.block_c)
        return self._launcher.grads(tiles, x, grad, hidden, grad_hidden, columns, self._outputs, p.r)

    def through(self, grad: torch.Tensor, down: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The backward's first part: gradients of x (None unless down) and of h / scale, times scale.

        It is a forward with W and the shadow's factors transposed, in any form.
        """
        p = self.merged
        out, depth = p.weight.shape
        tiles = self._of_shape(len(grad), out, depth, True)
        columns = self._cut(_through_tiles, (depth, p.blocks), tiles.block_n)
        grad_hidden = grad.new_empty(len(grad), p.a.shape[1])
        a, b = p.b[-1:].transpose(1, 2), p.a[-1:].transpose(1, 2)
        grad_x = FORMS[tiles.form](
            Call(
                self._launcher, tiles, grad, p.weight.T, None, a, b, grad_hidden, columns, self._backward_blocks, p.r,
                p.scale, p.backward, down, (Segment(0, len(grad), 0),),
            )
        )  # fmt: skip
        return grad_x, grad_hidden

    def _cut(self, cut: Callable[..., list[tuple[int, int, int, int]]], what: Any, size: int) -> ColumnTable:
        if (cut, size) not in self._columns:
            self._columns[cut, size] = ColumnTable.of(cut(what, size), size, self.merged.weight.device)
        return self._columns[cut, size]


def _through_tiles(what: tuple[int, int], size: int) -> list[tuple[int, int, int, int]]:
    """Column tiles of the gradient of x: each depends on every block of h's gradient."""
    depth, blocks = what
    return [(col, min(col + size, depth), 0, blocks) for col in range(0, depth, size)]


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
