"""Host side of the products with weights of 8 and 4 bits: checks, tiles, workspace, launches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from clif.kernels.fp8_matrix import Fp8Matrix
from clif.kernels.quantised import GROUP, QuantisedMatrix
from clif.kernels.quantised_kernel import quantised_dense, quantised_product
from clif.kernels.workspace import Workspace, Workspaces

INTERPRET = not isinstance(quantised_product, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were first imported)."""
FEW = 256
"""Rows up to which W is widened within the product. By reasoning: beyond it, a product is limited by arithmetic, where
torch's kernels are faster by more than the time to write W in another type and to read it again."""
DENSE_BLOCK = 1024
"""Numbers of a program that widens."""
MOST_SPLIT, LEAST_STEPS = 8, 4
"""Parts of a contraction, since partial sums cost memory traffic, and steps of one, which fill the pipeline."""
# Triton 3.10 no longer fuses products and sums by default: bitwise tests must not depend on the version.
OPTIONS = {"INTERPRET": INTERPRET, "enable_fp_fusion": True}
Matrix = QuantisedMatrix | Fp8Matrix


@dataclass(frozen=True)
class ProductTiles:
    """How quantised_product is computed. split: parts of the contraction."""

    block_m: int
    block_n: int
    block_k: int = 128
    split: int = 1
    warps: int = 4
    stages: int = 4


def block_k(itemsize: int) -> int:
    """Inputs of a step of a contraction, for rows of numbers of so many bytes."""
    return 128 if itemsize == 2 else 64


def product_tiles(rows: int, out: int, depth: int, bits: int, programs: int, itemsize: int = 2) -> ProductTiles:
    """The tiles of a shape, by reasoning. programs: multiprocessors; itemsize: bytes of a number of x.

    A tile has all rows up to 128, so that W is read once; of 4 bits, which take more registers, up to 64. What is read
    of x for a tile of W is then no more than W itself. The parts of a contraction fill the multiprocessors once where a
    tile is large, and twice where it is small. They depend on the shape alone, and the bits of a row on them.
    """
    block_m = max(16, min(128 if bits == 8 else 64, triton.next_power_of_2(rows)))
    block_n, step = (64 if block_m <= 32 else 128), block_k(itemsize)
    tiles, steps = -(-out // block_n) * -(-rows // block_m), -(-depth // step)
    wanted = programs * (2 if block_m <= 32 else 1)
    split = max(1, min(wanted // tiles, MOST_SPLIT, steps // LEAST_STEPS))
    return ProductTiles(block_m, block_n, step, split, 4 if block_n == 64 else 8, 4 if block_m <= 64 else 3)


class QuantisedKernels:
    """Launches the kernels on one device; shared by all layers of a model. tiles: of every shape, for tests."""

    def __init__(self, device: torch.device, tiles: ProductTiles | None = None) -> None:
        self.device, self._tiles = device, tiles
        self._workspaces = Workspaces(device)
        on_gpu = device.type == "cuda"
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 4

    def workspace(self) -> Workspace:
        """That of the current stream."""
        return self._workspaces.current()

    def takes(self, x: torch.Tensor, matrix: Matrix) -> bool:
        """Whether these are rows, few enough to be multiplied here, and groups divide the steps of the contraction."""
        return x.dim() == 2 and x.stride(1) == 1 and len(x) <= FEW and self.reads(x, matrix)

    def reads(self, x: torch.Tensor, matrix: Matrix) -> bool:
        """Whether groups divide the steps of the contraction."""
        return isinstance(matrix, Fp8Matrix) or matrix.by_output or block_k(x.itemsize) % (matrix.group or GROUP) == 0

    def product(self, x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        """x [rows, in] -> x W^T + bias [rows, out], in one launch that reads W once for each 128 rows. Waits for
        nothing. Raises ValueError for tensors that the kernel cannot read."""
        _check(x, matrix)
        rows, (out, depth) = len(x), (matrix.out, matrix.in_)
        y = x.new_empty(rows, out)
        if not rows:
            return y
        tiles = self._tiles or product_tiles(rows, out, depth, _bits(matrix), self._programs, x.itemsize)
        row_tiles, column_tiles = -(-rows // tiles.block_m), -(-out // tiles.block_n)
        space, targets = self.workspace(), row_tiles * column_tiles
        numbers, scales, added = matrix.numbers, matrix.scales, _added(matrix)
        split = tiles.split > 1
        planes = space.take_planes(targets * tiles.split * tiles.block_m * tiles.block_n if split else 1)
        tickets = space.take_tickets(targets if split else 1)
        quantised_product[(targets * tiles.split,)](
            x, numbers, scales, scales if added is None else added, x if bias is None else bias, y, planes, tickets,
            tickets, rows, out, depth, x.stride(0), numbers.stride(0), scales.stride(0), y.stride(0),
            **product_constants(matrix, tiles, bias is not None), **OPTIONS, num_warps=tiles.warps,
            num_stages=tiles.stages,
        )  # fmt: skip
        return y

    def grouped(self, x: torch.Tensor, matrix: Matrix, ends: torch.Tensor) -> torch.Tensor:
        """x [pairs, in], grouped by expert -> [pairs, out], each row with its expert's W. Waits for nothing.

        matrix: those of all experts, one below the other; ends [experts] int32: where the rows of each end. Raises
        ValueError as product() does.
        """
        _check(x, matrix)
        pairs, experts, depth = len(x), len(ends), matrix.in_
        y = x.new_empty(pairs, matrix.out // experts)
        if not pairs:
            return y
        # Twice the rows that an expert has on average.
        usual = min(-(-2 * pairs // experts), 64)
        wanted = self._tiles or product_tiles(usual, y.shape[1], depth, _bits(matrix), self._programs, x.itemsize)
        tiles = replace(wanted, split=1)
        targets = (-(-pairs // tiles.block_m) + experts) * -(-y.shape[1] // tiles.block_n)
        numbers, scales, added, space = matrix.numbers, matrix.scales, _added(matrix), self.workspace()
        quantised_product[(targets,)](
            x, numbers, scales, scales if added is None else added, x, y, space.planes, space.tickets, ends, pairs,
            y.shape[1], depth, x.stride(0), numbers.stride(0), scales.stride(0), y.stride(0),
            **product_constants(matrix, tiles, False, experts), **OPTIONS, num_warps=tiles.warps,
            num_stages=tiles.stages,
        )  # fmt: skip
        return y

    def dense(
        self, matrix: Matrix, dtype: torch.dtype, rows: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        """W [rows, columns] as matrix.dense() gives it, in one launch. Columns begin at a whole group."""
        (top, bottom, _), (left, right, _) = rows.indices(matrix.out), columns.indices(matrix.in_)
        numbers, scales, added = matrix.numbers, matrix.scales, _added(matrix)
        found = torch.empty(bottom - top, right - left, dtype=dtype, device=self.device)
        if found.numel():
            quantised_dense[(len(found), -(-found.shape[1] // DENSE_BLOCK))](
                numbers, scales, scales if added is None else added, found, top, left, *found.shape,
                numbers.stride(0), scales.stride(0), **_constants(matrix), BLOCK=DENSE_BLOCK, **OPTIONS,
            )  # fmt: skip
        return found


def product_constants(matrix: Matrix, tiles: ProductTiles, biased: bool, experts: int = 0) -> dict[str, Any]:
    """What quantised_product is compiled for."""
    return {
        **_constants(matrix), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
        "SPLIT": tiles.split, "HAS_BIAS": biased, "EXPERTS": experts,
    }  # fmt: skip


def _constants(matrix: Matrix) -> dict[str, Any]:
    added = {None: 0, torch.int8: 2}.get(getattr(_added(matrix), "dtype", None), 1)
    by_output = isinstance(matrix, Fp8Matrix) or matrix.by_output
    group = GROUP if isinstance(matrix, Fp8Matrix) else matrix.group or GROUP
    return {"BITS": _bits(matrix), "BY_OUTPUT": by_output, "GROUP": group, "ADDED": added}


def _bits(matrix: Matrix) -> int:
    """Of a number."""
    return matrix.bits if isinstance(matrix, QuantisedMatrix) else 8


def _added(matrix: Matrix) -> torch.Tensor | None:
    """Least numbers or zeros of groups."""
    if isinstance(matrix, Fp8Matrix):
        return None
    return matrix.zeros if matrix.least is None else matrix.least


def _check(x: torch.Tensor, matrix: Matrix) -> None:
    if x.dim() != 2 or x.shape[1] != matrix.in_ or x.stride(1) != 1:
        raise ValueError(f"x {list(x.shape)} does not fit W [{matrix.out}, {matrix.in_}], or its rows have gaps")
    if not x.dtype.is_floating_point or x.dtype == torch.float64:
        raise ValueError(f"x is of {x.dtype}: float32, bfloat16 and float16 are multiplied")
