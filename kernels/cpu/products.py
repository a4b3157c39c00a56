"""Products with packed matrices in bfloat16: frozen weights, and the LoRA factors of an engine's slots.

Sums are in float32 and rounded once, base, bias and adapter together. A row's result depends neither on the rows beside
it nor on the number of threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial

import torch

from clif.kernels.cpu import library
from clif.kernels.cpu.arena import Arena, aligned
from clif.kernels.cpu.quantised_panels import QuantisedPanels


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix [out, in] as the kernels read it: see clif_pack. It does not follow later changes of the weight."""

    out: int
    in_: int
    numbers: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, arena: Arena | None = None) -> PackedMatrix:
        """Pack a bfloat16 weight [out, in]. A transposed view serves: `of(weight.T)` multiplies gradients."""
        out, in_ = weight.shape
        packed = cls(out, in_, empty_packed(out, in_, arena))
        pack(weight, packed.numbers)
        return packed


def packed_size(out: int, in_: int) -> int:
    """Numbers that a packed matrix [out, in] takes."""
    size: int = library.load().clif_packed_size(out, in_)
    return size


def empty_packed(out: int, in_: int, arena: Arena | None = None) -> torch.Tensor:
    """Memory for a packed matrix [out, in], from the arena or of its own."""
    size = packed_size(out, in_)
    return arena.cut(size) if arena else aligned(size)


def pack(matrix: torch.Tensor, packed: torch.Tensor, scale: float = 1.0) -> None:
    """Lay matrix [out, in], times scale, out in `packed`. Raises TypeError for other types than bfloat16."""
    if matrix.dtype != torch.bfloat16 or matrix.device.type != "cpu":
        raise TypeError(f"only bfloat16 on a CPU is packed, not {matrix.dtype} on {matrix.device}")
    out, in_ = matrix.shape
    # A transposed view is copied first: the kernel reads rows.
    rows = matrix.detach() if matrix.stride(1) == 1 else matrix.detach().contiguous()
    library.load().clif_pack(rows.data_ptr(), out, in_, rows.stride(0), scale, packed.data_ptr())


class PackedFactors:
    """The LoRA factors of all slots of a merged layer, packed; B is packed times the adapters' scale.

    a: [slots, k r, in]; b: [slots, out, k r], both bfloat16, held as views: what is filled into a slot later counts
    from refresh(slot) on.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float, arena: Arena | None = None) -> None:
        self.factors, self.scale = (a, b), scale
        (slots, self.rank, in_), out = a.shape, b.shape[1]
        sizes = (packed_size(self.rank, in_), packed_size(out, self.rank))
        self.a, self.b = ((arena.cut if arena else aligned)(slots * size).view(slots, size) for size in sizes)
        for slot in range(slots):
            self.refresh(slot)

    def refresh(self, slot: int) -> None:
        """Pack the factors of one slot again."""
        a, b = self.factors
        pack(a[slot], self.a[slot])
        pack(b[slot], self.b[slot], self.scale)


def linear(
    packed: PackedMatrix | QuantisedPanels, bias: torch.Tensor | None = None, factors: PackedFactors | None = None
) -> library.Linear:
    """The kernels' view of a linear layer. The caller keeps the tensors alive as long as the view is used."""
    if isinstance(packed, QuantisedPanels):
        struct = packed.as_struct()
    else:
        struct = library.Linear(in_=packed.in_, out=packed.out, weight=packed.numbers.data_ptr(), bits=16)
    struct.bias = None if bias is None else bias.data_ptr()
    if factors is not None:
        a, b = factors.a, factors.b
        struct.rank, struct.a, struct.b = factors.rank, a.data_ptr(), b.data_ptr()
        struct.a_stride, struct.b_stride = a.stride(0), b.stride(0)
    return struct


def product(
    x: torch.Tensor,
    packed: PackedMatrix | QuantisedPanels,
    bias: torch.Tensor | None = None,
    factors: PackedFactors | None = None,
    slots: torch.Tensor | None = None,
    *,
    gated: bool = False,
    activation: int = library.SILU,
    low: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    level: int | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """y [..., out] = x [..., in] W^T + bias + scale (x A_s^T) B_s^T, with s = slots[row] (-1: none).

    gated: y [..., out / 2] = activation(gate) * up of W = gate | up, whose halves are multiples of 16, instead.
    x, bias: bfloat16; slots: int32 [rows]; low: where x A_s^T goes, see empty_low; out: where y [rows, out] goes, its
    rows in any distance. level, threads: by default the machine's and torch's. Raises TypeError for other types than
    bfloat16, ValueError for a shape that does not fit.
    """
    if gated and packed.out % 32:
        raise ValueError(f"the halves of {packed.out} outputs are no multiples of 16")
    rows, width = _rows(x, packed.in_), packed.out // 2 if gated else packed.out
    y = torch.empty(len(rows), width, dtype=torch.bfloat16) if out is None else out
    if factors is None or slots is None:
        low = None
    elif low is None:
        low = empty_low(len(rows), factors)
    kernels, struct = library.load(), ctypes.byref(linear(packed, bias, factors))
    compute = (
        partial(kernels.clif_linear_gated, struct, activation)
        if gated
        else partial(kernels.clif_linear_forward, struct)
    )
    compute(
        rows.data_ptr(),
        rows.stride(0),
        None if low is None or slots is None else slots.data_ptr(),
        None if low is None else low.data_ptr(),
        y.data_ptr(),
        y.stride(0),
        len(rows),
        library.level() if level is None else level,
        torch.get_num_threads() if threads is None else threads,
    )
    return y if out is not None else y.view(*x.shape[:-1], width)


def empty_low(rows: int, factors: PackedFactors) -> torch.Tensor:
    """Memory for x A_s^T of so many rows: [rows, k r padded to 32]."""
    return torch.empty(rows, -(-factors.rank // 32) * 32, dtype=torch.bfloat16)


def _rows(x: torch.Tensor, in_: int) -> torch.Tensor:
    """x as rows of `in_` numbers that lie together."""
    if x.dtype != torch.bfloat16:
        raise TypeError(f"these products are of bfloat16 numbers, not {x.dtype}")
    if x.shape[-1] != in_:
        raise ValueError(f"x has {x.shape[-1]} inputs, the matrix {in_}")
    rows = x.detach().reshape(-1, in_)
    return rows if rows.stride(1) == 1 or in_ == 1 else rows.contiguous()
