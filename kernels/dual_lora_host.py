"""Host side of the dual LoRA kernels: workspace, tables and launches of one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from clif.kernels.dual_lora_expand_kernel import dual_lora_expand
from clif.kernels.dual_lora_grads_kernel import dual_lora_grads
from clif.kernels.dual_lora_kernel import BASE, FUSED, SHRINK, dual_lora_linear
from clif.kernels.dual_lora_reference import Segment
from clif.kernels.dual_lora_table import ColumnTable, RowTable, StagedRowTable, tiles_of
from clif.kernels.side_stream import side_stream
from clif.kernels.tiles import GradTiles, LinearTiles, descriptor_boxes, piece_width
from clif.kernels.workspace import Workspace, Workspaces, current_stream

INTERPRET = not isinstance(dual_lora_linear, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were first imported)."""
KEPT_TABLES = 64
"""Tables of row tiles that are kept for batches that come again."""
INTERPRETED_PROGRAMS = 3
"""The interpreter runs programs one after the other: a few show that any number of them is right."""


class Tiling(Protocol):
    """Chooses how a shape is computed. rows of the batch, depth of the contraction, outputs, rank of an adapter.

    takes: whether the kernels are to compute a layer of such widths at all.
    """

    def takes(self, depth: int, out: int, rank: int) -> bool: ...

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles: ...

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles: ...


class KernelLauncher:
    """Launches the kernels on one device; shared by all layers of a model."""

    def __init__(self, device: torch.device, tiling: Tiling) -> None:
        self.device, self.tiling = device, tiling
        on_gpu = device.type == "cuda"
        self.programs = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 0
        self.side = side_stream(device)
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
        packed = (a.stride(2) if transposed else b.stride(1)) == len(blocks.tiles) * r
        result = x if y is None else y
        operands: dict[str, Any] = {"x": x, "w": weight, "a": a, "b": b}
        a_strides, b_strides = a.stride(), b.stride()
        # The copy engine begins at multiples of 16 bytes, also within a row.
        on_sixteen = blocks.aligned and (len(blocks.tiles) == 1 or r % 8 == 0)
        if tiles.tma and on_sixteen and (described := _described(tiles, rank_p, transposed, operands)):
            operands, a_strides, b_strides = described, (a.shape[1], *a.stride()[1:]), (b.shape[1], *b.stride()[1:])
        stored = tiles.store_tma and columns.full and _describable(result)
        target = TensorDescriptor.from_tensor(result, [tiles.block_m, piece_width(tiles)]) if stored else result

        def launch(form: int, shrinkers: int, others: int, **options: Any) -> None:
            # What only tiles of y need is the same in every launch for h alone: forms and tiles share it compiled.
            alone = form == SHRINK
            cut = replace(tiles, block_n=16, group_m=1, split=1) if alone else tiles
            w, low, end = (operands["x"], operands["x"], x) if alone else (operands["w"], operands["b"], target)
            biased, early = bias is not None and not alone, alone and tiles.form == "pair"
            dual_lora_linear[(shrinkers + others,)](
                operands["x"], w, bias if biased else x, operands["a"], low, hidden, end, rows.counts, rows.firsts,
                rows.pairs, columns.tiles, blocks.tiles, planes, planes[of_h:], tickets, tickets[targets:],
                space.take_flags(targets), space.left, scale, len(x), len(columns.tiles), shrinkers, depth,
                x.stride(0), *weight.stride(), *a_strides, *b_strides, 0 if y is None else y.stride(0),
                BLOCK_M=tiles.block_m, BLOCK_N=cut.block_n, BLOCK_K=tiles.block_k, GROUP_M=cut.group_m,
                SPLIT=cut.split, RANK=r, RANK_P=rank_p, BLOCKS=len(blocks.tiles), SLICES=tiles.slices, FORM=form,
                TRANSPOSED=transposed, ALIGNED=columns.aligned and blocks.aligned, PACKED=packed,
                EARLY=early, HAS_BIAS=biased, TMA=operands["x"] is not x, STORE_TMA=stored and not alone,
                INTERPRET=INTERPRET, **_options(tiles.warps, tiles.stages), **options,
            )  # fmt: skip

        if y is None:
            launch(SHRINK, shrinkers, 0)
        elif tiles.form == "pair":
            launch(SHRINK, shrinkers, 0)
            launch(BASE, 0, others, **({} if INTERPRET else {"launch_pdl": True}))
        else:
            launch(FUSED, shrinkers, others)

    def expand(
        self,
        tiles: LinearTiles,
        hidden: torch.Tensor,
        b: torch.Tensor,
        y: torch.Tensor,
        rows: RowTable,
        columns: ColumnTable,
        r: int,
    ) -> None:
        """Add h B_s^T to y [rows, out], for the rows of each pair; hidden [rows, k r] is h, b as in linear().

        Where tiles.early is set, linear() has made h in the launch before it on the current stream, which in the form
        branches is another one.
        """
        early = tiles.early and tiles.form != "branches" and not INTERPRET
        dual_lora_expand[(rows.capacity * len(columns.tiles),)](
            hidden, b, y, rows.counts, rows.pairs, columns.tiles, len(columns.tiles), *b.stride(), y.stride(0),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, RANK=r, RANK_P=_padded(r), BLOCKS=hidden.shape[1] // r,
            ALIGNED=columns.aligned, PACKED=b.stride(1) == hidden.shape[1], EARLY=early, INTERPRET=INTERPRET,
            **_options(tiles.warps, tiles.stages), **({"launch_pdl": True} if early else {}),
        )  # fmt: skip

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
        if described := tiles.tma and columns.aligned and _describable(x) and _describable(grad):
            wide = tuple(TensorDescriptor.from_tensor(m, [tiles.block_r, tiles.block_c]) for m in (x, grad))
        dual_lora_grads[(targets * tiles.slices,)](
            *wide, hidden, grad_hidden, grad_a, grad_b, columns.tiles, planes, tickets, len(x), d_in,
            x.stride(0), grad.stride(0), BLOCK_C=tiles.block_c, BLOCK_R=tiles.block_r, RANK=r, RANK_P=rank_p,
            BLOCKS=blocks, SLICES=tiles.slices, ALIGNED=columns.aligned, TMA=described, INTERPRET=INTERPRET,
            **_options(tiles.warps, tiles.stages),
        )  # fmt: skip
        return grad_a, grad_b


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
