"""Host side of the dual LoRA kernels: workspace, launches, and one object per packed linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import triton
from torch.nn.functional import linear

from clif.kernels.dual_lora import Segment, add_dual_lora, shadow_backward
from clif.kernels.dual_lora_grads import dual_lora_grads
from clif.kernels.dual_lora_linear import BASE, FUSED, SHRINK, SYNC_HEADER, dual_lora_linear
from clif.kernels.tiles import GradTiles, LinearTiles, Member, RowTable, column_tiles, grad_tiles

INTERPRET = not isinstance(dual_lora_linear, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were first imported)."""
INTERPRETED_PROGRAMS = 3
"""The interpreter runs programs one after the other: a few show that any number of them will do."""


class Tiling(Protocol):
    """Chooses how a shape is computed. rows of the batch, depth of the contraction, outputs, rank of an adapter."""

    def linear(self, rows: int, depth: int, out: int, rank: int, backward: bool) -> LinearTiles: ...

    def grads(self, rows: int, depth: int, out: int, rank: int) -> GradTiles: ...


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed linear layer and its adapters, as the kernels read them; everything is a view, nothing is copied.

    weight [out, in]; bias [out] or None; a [slots, k r, in] and b [slots, out, k r] for k adapted members, b with each
    member's factor in its own rows and columns. The last slot is the shadow's.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    r: int
    scale: float
    members: tuple[Member, ...]

    @property
    def blocks(self) -> int:
        return self.a.shape[1] // self.r


@dataclass
class Workspace:
    """Counters (zero between launches) and partial sums of one stream; grows when a launch needs more."""

    device: torch.device
    sync: torch.Tensor = field(init=False)
    planes: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sync = torch.zeros(16 + 2 * 256, dtype=torch.int32, device=self.device)
        self.planes = torch.empty(1 << 16, dtype=torch.float32, device=self.device)

    def take(self, targets: int, partial_sums: int) -> tuple[torch.Tensor, ...]:
        """planes, header, tickets and flags for a launch with so many tiles to be summed."""
        # Multiples of 16 words keep every part aligned, which the compiler makes use of.
        room = -(-targets // 16) * 16
        if 16 + 2 * room > len(self.sync):
            self.sync = torch.zeros(16 + 4 * room, dtype=torch.int32, device=self.device)
        if partial_sums > len(self.planes):
            self.planes = torch.empty(partial_sums, dtype=torch.float32, device=self.device)
        return self.planes, self.sync[:SYNC_HEADER], self.sync[16 : 16 + room], self.sync[16 + room : 16 + 2 * room]


class Launcher:
    """Launches the kernels on one device; shared by all layers of a model."""

    def __init__(self, device: torch.device, tiling: Tiling) -> None:
        self.device, self.tiling = device, tiling
        on_gpu = device.type == "cuda"
        self.programs = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 0
        self._workspaces: dict[int, Workspace] = {}
        self._tables: dict[tuple[Any, ...], RowTable] = {}
        self._constants: dict[tuple[Any, ...], torch.Tensor] = {}

    def workspace(self) -> Workspace:
        """One per stream: launches of one stream never overlap."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        return self._workspaces.setdefault(stream, Workspace(self.device))

    def rows(self, segments: Sequence[Segment], rows: int, block_m: int, slots: int) -> RowTable:
        """The row tiles of a batch: made once, for all layers."""
        key = (tuple(segments), rows, block_m, slots)
        if key not in self._tables:
            if len(self._tables) > 64:
                self._tables.clear()
            self._tables[key] = RowTable.make(segments, rows, block_m, slots, self.device)
        return self._tables[key]

    def constant(self, values: Sequence[Sequence[int]]) -> torch.Tensor:
        """A small table that layers of one shape share."""
        key = tuple(map(tuple, values))
        if key not in self._constants:
            self._constants[key] = torch.tensor(key, dtype=torch.int32, device=self.device)
        return self._constants[key]

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
        columns: Sequence[Sequence[int]],
        blocks: Sequence[Sequence[int]],
        r: int,
        scale: float,
    ) -> None:
        """Fill y [rows, out] (None: only h is wanted) and hidden [rows, k r].

        x [rows, depth]; weight [out, depth] or a transposed view; a [slots, k r, depth] and b [slots, out, k r], any
        strides.
        """
        depth, transposed, rank_p = x.shape[1], weight.stride(1) != 1, _padded(r)
        targets = rows.capacity * len(blocks)
        planes, sync, tickets, flags = self.workspace().take(targets, targets * tiles.slices * tiles.block_m * rank_p)
        tma = tiles.tma and not INTERPRET and _describable(x) and _describable(weight.T if transposed else weight)
        source, matrix = (x, weight)
        if tma:
            source = _descriptor(x, tiles.block_m, tiles.block_k)
            matrix = (
                _descriptor(weight.T, tiles.block_k, tiles.block_n)
                if transposed
                else _descriptor(weight, tiles.block_n, tiles.block_k)
            )

        def launch(form: int, **options: Any) -> None:
            dual_lora_linear[(INTERPRETED_PROGRAMS if INTERPRET else self.programs * tiles.programs,)](
                source, matrix, x if bias is None else bias, a, b, hidden, x if y is None else y, rows.counts,
                rows.tiles, self.constant(columns), self.constant(blocks), planes, sync, tickets, flags, scale,
                len(columns), depth, x.stride(0), weight.stride(0), weight.stride(1), *a.stride(), *b.stride(),
                0 if y is None else y.stride(0),
                BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m, RANK=r,
                RANK_P=rank_p, BLOCKS=len(blocks), SLICES=tiles.slices, FORM=form, TRANSPOSED=transposed,
                HAS_BIAS=bias is not None, TMA=tma, INTERPRET=INTERPRET, **_options(tiles.warps, tiles.stages),
                **options,
            )  # fmt: skip

        if y is None:
            launch(SHRINK)
        elif tiles.form == "pair":
            launch(SHRINK)
            launch(BASE, **({} if INTERPRET else {"launch_pdl": True}))
        else:
            launch(FUSED)

    def grads(
        self,
        tiles: GradTiles,
        x: torch.Tensor,
        grad: torch.Tensor,
        hidden: torch.Tensor,
        grad_hidden: torch.Tensor,
        columns: Sequence[Sequence[int]],
        outputs: int,
        r: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of A [k r, d_in] and of B [adapted outputs, r], float32."""
        d_in, rank_p, blocks = x.shape[1], _padded(r), hidden.shape[1] // r
        grad_a = x.new_empty(blocks * r, d_in, dtype=torch.float32)
        grad_b = x.new_empty(outputs, r, dtype=torch.float32)
        targets = -(-d_in // tiles.block_c) * blocks + len(columns)
        planes, _, tickets, _ = self.workspace().take(targets, targets * tiles.slices * rank_p * tiles.block_c)
        dual_lora_grads[(targets * tiles.slices,)](
            x, grad, hidden, grad_hidden, grad_a, grad_b, self.constant(columns), planes, tickets, len(x), d_in,
            x.stride(0), grad.stride(0), BLOCK_C=tiles.block_c, BLOCK_R=tiles.block_r, RANK=r, RANK_P=rank_p,
            BLOCKS=blocks, SLICES=tiles.slices, INTERPRET=INTERPRET, **_options(tiles.warps, tiles.stages),
        )  # fmt: skip
        return grad_a, grad_b


class FusedLinear:
    """One packed layer: forward for rows of any slots, backward for rows of the shadow."""

    def __init__(self, packed: Packed, launcher: Launcher) -> None:
        self.packed, self._launcher = packed, launcher

    def forward(self, x: torch.Tensor, segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
        """y [rows, out] and h = scale * x A^T [rows, k r] of x [rows, in]; rows in no segment have no h.

        Raises ValueError for segments that overlap.
        """
        p, x = self.packed, _rows(x)
        out, depth = p.weight.shape
        tiles = self._launcher.tiling.linear(len(x), depth, out, p.r, False)
        hidden = x.new_empty(len(x), p.a.shape[1])
        if tiles.form == "separate":
            return self._separate(x, segments, hidden), hidden
        y = x.new_empty(len(x), out)
        if len(x):
            rows = self._launcher.rows(segments, len(x), tiles.block_m, len(p.a))
            columns, blocks = column_tiles(p.members, tiles.block_n), [(0, depth)] * p.blocks
            self._launcher.linear(tiles, x, p.weight, p.bias, p.a, p.b, hidden, y, rows, columns, blocks, p.r, p.scale)
        return y, hidden

    def _separate(self, x: torch.Tensor, segments: Sequence[Segment], hidden: torch.Tensor) -> torch.Tensor:
        p = self.packed
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
        p, grad, x = self.packed, _rows(grad), _rows(x)
        out, depth = p.weight.shape
        outputs = sum(m.stop - m.start for m in p.members if m.block is not None)
        if not len(x):
            zeros = x.new_zeros
            return (x if down else None), zeros(p.a.shape[1:], dtype=torch.float32), zeros(outputs, p.r).float()
        a, b = p.a[-1:].transpose(1, 2), p.b[-1:].transpose(1, 2)
        tiles = self._launcher.tiling.linear(len(x), out, depth, p.r, True)
        grad_hidden = torch.empty_like(hidden)
        grad_x = torch.empty_like(x) if down else None
        if tiles.form == "separate":
            grad_x = grad @ p.weight if down else None
            torch.mul(grad @ p.b[-1], p.scale, out=grad_hidden)
            if grad_x is not None:
                grad_x.addmm_(grad_hidden, p.a[-1])
        else:
            rows = self._launcher.rows((Segment(0, len(x), 0),), len(x), tiles.block_m, 1)
            columns = column_tiles([Member(0, depth, None)], tiles.block_n)
            columns = [(first, stop, 0, p.blocks) for first, stop, _, _ in columns]
            blocks = [(m.start, m.stop) for m in p.members if m.block is not None]
            self._launcher.linear(
                tiles, grad, p.weight.T, None, b, a, grad_hidden, grad_x, rows, columns, blocks, p.r, p.scale
            )
        of_factors = self._launcher.tiling.grads(len(x), depth, out, p.r)
        columns = grad_tiles(p.members, of_factors.block_c)
        grad_a, grad_b = self._launcher.grads(of_factors, x, grad, hidden, grad_hidden, columns, outputs, p.r)
        return grad_x, grad_a, grad_b


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(r: int) -> int:
    """Tensor cores multiply depths of 16 and more."""
    return max(16, triton.next_power_of_2(r))


def _options(warps: int, stages: int) -> dict[str, Any]:
    # Triton 3.10 will no longer fuse products and sums by itself: bitwise tests must not depend on the version.
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _describable(matrix: torch.Tensor) -> bool:
    """Whether the copy engine can read it: 16-byte aligned rows."""
    pitch = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and pitch % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])
