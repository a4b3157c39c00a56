"""Quantised matrices as the C++ kernels read them: see clif_linear in clif_cpu.h for how numbers and scales lie."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from clif.kernels.cpu import library
from clif.kernels.cpu.arena import Arena, aligned
from clif.kernels.quantised import Bits, QuantisedMatrix, strips

PANEL, DEPTH = 16, 32
"""Outputs and inputs of a tile."""
PIECE = 1 << 20
"""Numbers that are laid out at a time."""


@dataclass(frozen=True, eq=False)
class QuantisedPanels:
    """A matrix [out, in_] of 8 or 4 bits, both sides padded to 32.

    numbers: bytes of all tiles; scales: [panels, groups, 16], of whole or half tiles, see clif_linear; least: as many,
    or zero points, or None. shift: clif_linear's group_shift.
    """

    out: int
    in_: int
    bits: Bits
    numbers: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor | None
    shift: int

    @classmethod
    def of(cls, matrix: QuantisedMatrix, arena: Arena | None = None) -> QuantisedPanels:
        """The same matrix, laid out. Nothing is rounded again."""
        panels, tiles = _sizes(matrix.out, matrix.in_)
        each = tiles * PANEL * DEPTH * matrix.bits // 8
        numbers = _empty(panels * each // 2, arena).view(torch.uint8)
        lay = _lay8 if matrix.bits == 8 else _lay4
        for rows in strips(panels * PANEL, tiles * DEPTH, PIECE, PANEL):
            to = numbers[rows.start // PANEL * each : rows.stop // PANEL * each]
            part = pad(matrix.whole(rows), (0, 0, 0, rows.stop - max(rows.start, min(rows.stop, matrix.out))))
            to.copy_(lay(pad(part, (0, tiles * DEPTH - part.shape[1]))))
        shift, spread = _groups(matrix)
        many = _rows_of_scales(shift, tiles)
        added = matrix.zeros if matrix.least is None else matrix.least
        scales, least = (_lay_scales(of, spread, many, panels, arena) for of in (matrix.scales, added))
        assert scales is not None
        return cls(matrix.out, matrix.in_, matrix.bits, numbers, scales, least, shift)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Numbers and scales."""
        return (self.numbers, self.scales) if self.least is None else (self.numbers, self.scales, self.least)

    def as_struct(self) -> library.Linear:
        """For the library; the tensors have to live as long."""
        struct = library.Linear(in_=self.in_, out=self.out, weight=self.numbers.data_ptr(), bits=self.bits)
        struct.scales = self.scales.data_ptr()
        struct.scale_type, struct.group_shift = library.SCALE_TYPES[self.scales.dtype], self.shift
        if self.least is not None:
            struct.least, struct.least_type = self.least.data_ptr(), library.SCALE_TYPES[self.least.dtype]
        return struct

    def widened(self, columns: slice) -> torch.Tensor:
        """As dense(), in bfloat16, by the kernels."""
        start, stop, _ = columns.indices(self.in_)
        first, tiles = start // DEPTH, -(-stop // DEPTH) - start // DEPTH
        rows = torch.empty(_sizes(self.out, self.in_)[0] * PANEL, tiles * DEPTH, dtype=torch.bfloat16)
        to, threads = rows.data_ptr(), torch.get_num_threads()
        library.load().clif_widen(ctypes.byref(self.as_struct()), first, tiles, to, threads)
        return rows[: self.out, : stop - start]

    def dense(self, dtype: torch.dtype, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """W [rows, columns], each number rounded once to dtype."""
        return self.matrix().dense(dtype, rows, columns)

    def matrix(self) -> QuantisedMatrix:
        """The inverse of of()."""
        panels, tiles = _sizes(self.out, self.in_)
        laid = self.numbers.view(panels, tiles, -1)
        numbers = _whole8(laid)[: self.out, : self.in_] if self.bits == 8 else _whole4(laid)[: self.out]
        scales, added = (
            None if of is None else of.view(panels, -1, PANEL).transpose(1, 2).flatten(0, 1)[: self.out]
            for of in (self.scales, self.least)
        )
        assert scales is not None
        least, zeros = (None, added) if added is not None and added.dtype == torch.int8 else (added, None)
        group: int | None = DEPTH // 2 if self.shift < 0 else DEPTH << min(self.shift, tiles.bit_length())
        if self.bits == 8 and self.shift == library.BY_OUTPUT and added is None:
            group = None
        return QuantisedMatrix(self.bits, self.in_, numbers, scales, least, zeros, group)


def panels_size(matrix: QuantisedMatrix) -> int:
    """Numbers of an arena that the panels of a matrix take."""
    panels, tiles = _sizes(matrix.out, matrix.in_)
    rows = panels * PANEL * _rows_of_scales(_groups(matrix)[0], tiles)
    added = matrix.zeros if matrix.least is None else matrix.least
    bytes_ = [panels * tiles * PANEL * DEPTH * matrix.bits // 8, rows * matrix.scales.itemsize]
    bytes_ += [] if added is None else [rows * added.itemsize]
    return sum(Arena.rounded(size // 2) for size in bytes_)


def _groups(matrix: QuantisedMatrix) -> tuple[int, int]:
    """clif_linear's group_shift, and how many of its groups one of the matrix is."""
    if matrix.group is None:
        return (library.BY_OUTPUT if matrix.bits == 8 else 0), 1
    if matrix.group >= matrix.in_:
        return library.BY_OUTPUT, 1
    unit = matrix.group & -matrix.group
    return (-1 if unit < DEPTH else (unit // DEPTH).bit_length() - 1), matrix.group // unit


def _rows_of_scales(shift: int, tiles: int) -> int:
    return 2 * tiles if shift < 0 else (tiles - 1 >> shift) + 1


def _sizes(out: int, in_: int) -> tuple[int, int]:
    """Panels and tiles of each."""
    return -(-out // (2 * PANEL)) * 2, -(-in_ // DEPTH)


def _empty(size: int, arena: Arena | None) -> torch.Tensor:
    return arena.cut(size) if arena else aligned(size)


def _lay8(whole: torch.Tensor) -> torch.Tensor:
    """Whole numbers [outputs, inputs] -> bytes of [panel, tile, pair, 2, output]."""
    tiled = whole.unflatten(0, (-1, PANEL)).unflatten(2, (-1, DEPTH // 2, 2))
    return tiled.permute(0, 2, 3, 4, 1).contiguous().view(torch.uint8).flatten()


def _whole8(numbers: torch.Tensor) -> torch.Tensor:
    """The inverse: [panels, tiles, bytes] -> [outputs, inputs]."""
    tiled = numbers.view(torch.int8).unflatten(2, (DEPTH // 2, 2, PANEL))
    return tiled.permute(0, 4, 1, 2, 3).flatten(0, 1).flatten(1)


def _lay4(whole: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 15 [outputs, inputs] -> bytes of [panel, tile, 2, half, 8 outputs, 2, 4 x 2 pairs]."""
    tiled = whole.unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 2, 4, 2, 2))
    first, second = tiled.permute(0, 3, 4, 1, 2, 7, 5, 6).unbind(-1)
    return (first | second << 4).flatten()


def _whole4(numbers: torch.Tensor) -> torch.Tensor:
    """The inverse, as QuantisedMatrix has them: [panels, tiles, bytes] -> [outputs, inputs / 2]."""
    tiled = numbers.unflatten(2, (2, 2, 8, 2, 4))
    pairs = torch.stack((tiled & 15, tiled >> 4), -1)
    even, odd = pairs.permute(0, 3, 4, 1, 2, 6, 7, 5).unbind(-1)
    return (even | odd << 4).flatten(0, 2).flatten(1)


def _lay_scales(of: torch.Tensor | None, each: int, rows: int, panels: int, arena: Arena | None) -> torch.Tensor | None:
    """Scales [out, groups], or what is added, as the kernels read them: `rows` of 16 for each panel."""
    if of is None:
        return None
    spread = of.repeat_interleave(each, 1)[:, :rows] if each > 1 else of[:, :rows]
    padded = pad(spread, (0, rows - spread.shape[1], 0, panels * PANEL - len(spread)))
    laid = padded.unflatten(0, (-1, PANEL)).transpose(1, 2)
    room = _empty(laid.numel() * of.itemsize // 2, arena).view(of.dtype)
    room.copy_(laid.reshape(-1))
    return room
