"""Host side of the dual LoRA kernels: workspace, launches, and one object per merged linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import triton
from torch.nn.functional import linear
from triton.tools.tensor_descriptor import TensorDescriptor

from clif.kernels.dual_lora_grads_kernel import dual_lora_grads
from clif.kernels.dual_lora_kernel import BASE, FUSED, SHRINK, dual_lora_linear
from clif.kernels.dual_lora_reference import MergedLinear, Segment
from clif.kernels.dual_lora_table import (
    ColumnTable,
    RowTable,
    RowTables,
    StagedRowTable,
    column_tiles,
    grad_tiles,
    tiles_of,
)
from clif.kernels.tiles import GradTiles, LinearTiles, descriptor_boxes, piece_width
from clif.kernels.workspace import Workspace, Workspaces, current_stream

INTERPRET = not isinstance(dual_lora_linear, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were first imported)."""
KEPT_TABLES = 64
"""Tables of row tiles that are kept for batches that come again."""
INTERPRETED_PROGRAMS = 3
"""The interpreter runs programs one after the other: a few show that any number of them is right."""


class Tiling(Protocol):
    """Chooses how a shape is computed. rows of the batch, depth of the contraction, outputs, rank of an adapter."""

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles: ...

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles: ...


class KernelLauncher:
    """Launches the kernels on one device; shared by all layers of a model."""

    def __init__(self, device: torch.device, tiling: Tiling) -> None:
        self.device, self.tiling = device, tiling
        on_gpu = device.type == "cuda"
        self.programs = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 0
        self._workspaces = Workspaces(device)
        self._tables: dict[tuple[Any, ...], StagedRowTable] = {}

    def workspace(self) -> Workspace:
        """That of the current stream."""
        return self._workspaces.current()

    def rows(self, segments: Sequence[Segment], rows: int, block_m: int, slots: int) -> RowTable:
        """The pairs of a batch, made once for all layers on a stream: another one would not wait for them."""
        key = (current_stream(self.device), tuple(segments), rows, block_m, slots)
        if key not in self._tables:
            if len(self._tables) > KEPT_TABLES:
                # The oldest alone: a graph that is being captured reads those that were made for it, see held().
                del self._tables[next(iter(self._tables))]
            self._tables[key] = StagedRowTable(segments, rows, block_m, slots, self.device)
        return self._tables[key]

    def held(self) -> tuple[RowTable, ...]:
        """The tables that it keeps now: it forgets the oldest when there are many."""
        return tuple(self._tables.values())

    def linear(
        self,
        tiles: LinearTiles,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        hidden: torch.Tensor,
        y: torch.Tensor | None,
        rows: RowTable,
        columns: ColumnTable,
        blocks: ColumnTable,
        r: int,
        scale: float,
    ) -> None:
        """Fill y [rows, out] (None: only h is wanted) and hidden [rows, k r].

        x [rows, depth]; weight [out, depth] or a transposed view; a [slots, k r, depth] and b [slots, out, k r], any
        strides.
        """
        depth, transposed, rank_p = x.shape[1], weight.stride(1) != 1, _padded(r)
        space, targets = self.workspace(), _padded(rows.capacity * len(blocks.tiles))
        outputs = 0 if y is None or tiles.split == 1 else tiles_of(len(x), tiles.block_m) * len(columns.tiles)
        tickets = space.take_tickets(targets + outputs)
        of_h = targets * tiles.slices * tiles.block_m * rank_p
        planes = space.take_planes(of_h + outputs * tiles.split * tiles.block_m * tiles.block_n)
        shrinkers = min(tiles.shrinkers, rows.capacity * len(blocks.tiles) * tiles.slices)
        others = (INTERPRETED_PROGRAMS if INTERPRET else self.programs) * tiles.programs
        result = x if y is None else y
        operands: dict[str, Any] = {"x": x, "w": weight, "a": a, "b": b}
        a_strides, b_strides = a.stride(), b.stride()
        if tiles.tma and (described := _described(tiles, rank_p, transposed, operands)):
            operands, a_strides, b_strides = described, (a.shape[1], *a.stride()[1:]), (b.shape[1], *b.stride()[1:])
        stored = tiles.store_tma and columns.full and _describable(result)
        target = TensorDescriptor.from_tensor(result, [tiles.block_m, piece_width(tiles)]) if stored else result

        def launch(form: int, shrinkers: int, others: int, **options: Any) -> None:
            dual_lora_linear[(shrinkers + others,)](
                operands["x"], operands["w"], x if bias is None else bias, operands["a"], operands["b"], hidden,
                target, rows.counts, rows.firsts, rows.pairs, columns.tiles, blocks.tiles, planes, planes[of_h:],
                tickets, tickets[targets:], space.take_flags(targets), space.left, scale, len(x), len(columns.tiles),
                shrinkers, depth, x.stride(0), *weight.stride(), *a_strides, *b_strides,
                0 if y is None else y.stride(0),
                BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
                SPLIT=tiles.split, RANK=r, RANK_P=rank_p, BLOCKS=len(blocks.tiles), SLICES=tiles.slices, FORM=form,
                TRANSPOSED=transposed, ALIGNED=columns.aligned and blocks.aligned, HAS_BIAS=bias is not None,
                TMA=operands["x"] is not x, STORE_TMA=stored, INTERPRET=INTERPRET,
                **_options(tiles.warps, tiles.stages), **options,
            )  # fmt: skip

        if y is None:
            launch(SHRINK, shrinkers, 0)
        elif tiles.form == "pair":
            launch(SHRINK, shrinkers, 0)
            launch(BASE, 0, others, **({} if INTERPRET else {"launch_pdl": True}))
        else:
            launch(FUSED, shrinkers, others)

    def grads(
        self,
        tiles: GradTiles,
        x: torch.Tensor,
        grad: torch.Tensor,
        hidden: torch.Tensor,
        grad_hidden: torch.Tensor,
        columns: ColumnTable,
        outputs: int,
        r: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of A [k r, d_in] and of B [adapted outputs, r], float32."""
        d_in, rank_p, blocks = x.shape[1], _padded(r), hidden.shape[1] // r
        grad_a = x.new_empty(blocks * r, d_in, dtype=torch.float32)
        grad_b = x.new_empty(outputs, r, dtype=torch.float32)
        targets = -(-d_in // tiles.block_c) * blocks + len(columns.tiles)
        space = self.workspace()
        tickets, planes = (
            space.take_tickets(targets),
            space.take_planes(targets * tiles.slices * rank_p * tiles.block_c),
        )
        wide: tuple[Any, Any] = (x, grad)
        if described := tiles.tma and _describable(x) and _describable(grad):
            wide = tuple(TensorDescriptor.from_tensor(m, [tiles.block_r, tiles.block_c]) for m in (x, grad))
        dual_lora_grads[(targets * tiles.slices,)](
            *wide, hidden, grad_hidden, grad_a, grad_b, columns.tiles, planes, tickets, len(x), d_in,
            x.stride(0), grad.stride(0), BLOCK_C=tiles.block_c, BLOCK_R=tiles.block_r, RANK=r, RANK_P=rank_p,
            BLOCKS=blocks, SLICES=tiles.slices, ALIGNED=columns.aligned, TMA=described, INTERPRET=INTERPRET,
            **_options(tiles.warps, tiles.stages),
        )  # fmt: skip
        return grad_a, grad_b


class FusedLinear:
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
        out, depth = p.weight.shape
        hidden, y = x.new_empty(len(x), p.a.shape[1]), x.new_empty(len(x), out)
        if not len(x):
            return y, hidden
        tiles = self._launcher.tiling.linear(len(x), depth, out, p.r, False)
        if tiles.form == "separate" and not isinstance(segments, RowTable):
            return self._separate(x, segments, hidden), hidden
        rows = self._table_of(segments, len(x), tiles, tables)
        columns = self._cut(column_tiles, p.projections, tiles.block_n)
        blocks = self._forward_blocks
        self._launcher.linear(tiles, x, p.weight, p.bias, p.a, p.b, hidden, y, rows, columns, blocks, p.r, p.scale)
        return y, hidden

    def height(self, rows: int) -> int:
        """Rows of a tile in the forward of so many rows: a table of that height fits."""
        out, depth = self.merged.weight.shape
        return self._launcher.tiling.linear(rows, depth, out, self.merged.r, False).block_m

    def _table_of(
        self, segments: Sequence[Segment] | RowTable, rows: int, tiles: LinearTiles, tables: RowTables | None
    ) -> RowTable:
        if not isinstance(segments, RowTable):
            if tables is not None:
                return tables.of(tiles.block_m, len(self.merged.a))
            return self._launcher.rows(segments, rows, tiles.block_m, len(self.merged.a))
        if tiles.form == "separate" or segments.block_m != tiles.block_m:
            raise ValueError(f"a table of {segments.block_m}-row tiles does not fit {tiles}: make it for these")
        return segments

    def _separate(self, x: torch.Tensor, segments: Sequence[Segment], hidden: torch.Tensor) -> torch.Tensor:
        p = self.merged
        y = linear(x, p.weight, p.bias)
        for start, stop, slot in segments:
            torch.mul(x[start:stop] @ p.a[slot].T, p.scale, out=hidden[start:stop])
            y[start:stop].addmm_(hidden[start:stop], p.b[slot].T)
        return y

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
        """The backward's second launch: gradients of A and B."""
        p = self.merged
        out, depth = p.weight.shape
        tiles = self._launcher.tiling.grads(len(x), depth, out, p.r)
        columns = self._cut(grad_tiles, p.projections, tiles.block_c)
        return self._launcher.grads(tiles, x, grad, hidden, grad_hidden, columns, self._outputs, p.r)

    def through(self, grad: torch.Tensor, down: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The backward's first launch: gradients of x (None unless down) and of h / scale, times scale.

        It is the forward's kernel, with the shadow's factors swapped.
        """
        p = self.merged
        out, depth = p.weight.shape
        tiles = self._launcher.tiling.linear(len(grad), out, depth, p.r, True)
        if tiles.form == "separate":
            grad_hidden = (grad @ p.b[-1]).mul_(p.scale)
            return torch.addmm(grad @ p.weight, grad_hidden, p.a[-1]) if down else None, grad_hidden
        grad_hidden = grad.new_empty(len(grad), p.a.shape[1])
        grad_x = grad.new_empty(len(grad), depth) if down else None
        a, b = p.a[-1:].transpose(1, 2), p.b[-1:].transpose(1, 2)
        rows = self._launcher.rows((Segment(0, len(grad), 0),), len(grad), tiles.block_m, 1)
        columns = self._cut(_through_tiles, (depth, p.blocks), tiles.block_n)
        blocks = self._backward_blocks
        self._launcher.linear(
            tiles, grad, p.weight.T, None, b, a, grad_hidden, grad_x, rows, columns, blocks, p.r, p.scale
        )
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


def _padded(r: int) -> int:
    """The rank, padded for tensor cores, which multiply depths of 16 and more."""
    return max(16, triton.next_power_of_2(r))


def _options(warps: int, stages: int) -> dict[str, Any]:
    # Triton 3.10 no longer fuses products and sums by default: bitwise tests must not depend on the version.
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _described(
    tiles: LinearTiles, rank: int, transposed: bool, operands: dict[str, torch.Tensor]
) -> dict[str, TensorDescriptor] | None:
    """Tensor descriptors of the operands, as they lie in memory, with the slots of factors one below the other.

    None if the copy engine cannot read one of them.
    """
    x, w, a, b = operands.values()
    if transposed:
        w, a, b = w.T, a.transpose(1, 2), b.transpose(1, 2)
    lying = {"x": x, "w": w, "a": a.flatten(0, 1), "b": b.flatten(0, 1)}
    if not all(_describable(matrix) for matrix in lying.values()):
        return None
    boxes = descriptor_boxes(tiles, rank, transposed)
    return {name: TensorDescriptor.from_tensor(matrix, [*boxes[name]]) for name, matrix in lying.items()}


def _describable(matrix: torch.Tensor) -> bool:
    """Whether the copy engine can read a matrix: rows aligned to 16 bytes, of a type that tensor cores multiply."""
    pitch = matrix.stride(0) * matrix.element_size()
    return matrix.element_size() == 2 and matrix.stride(1) == 1 and pitch % 16 == 0 and matrix.data_ptr() % 16 == 0
