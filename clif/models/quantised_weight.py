"""The frozen weight of a linear layer in 8 or 4 bits, however its numbers are made: torch's products with strips of it
made dense, anywhere, those of the Triton kernels for few rows on a GPU, and those of the C++ kernels on a CPU.

Invariant: no more than a strip is dense at a time, forward and backward. Activations, gradients and adapters stay in
the type of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.nn.functional import linear

from clif.kernels.cpu.products import product
from clif.kernels.cpu.quantised_panels import QuantisedPanels
from clif.kernels.fp8_matrix import Fp8Matrix
from clif.kernels.quantised import GROUP, QuantisedMatrix, strips
from clif.models.nf4_matrix import Nf4Matrix

if TYPE_CHECKING:
    from clif.kernels.quantised_host import QuantisedKernels

Matrix: TypeAlias = QuantisedMatrix | Fp8Matrix | Nf4Matrix
"""Numbers and scales, with what they stand for."""
STRIP = {"cpu": 1 << 19}
"""Numbers that are dense at a time, by kind of device."""
STRIP_ELSEWHERE = 1 << 25
"""A GPU is given fewer and larger products."""


class _Strips:
    """What is the same however the numbers lie."""

    matrix: Matrix | QuantisedPanels
    bias: torch.Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.matrix.out, self.matrix.in_))

    @property
    def device(self) -> torch.device:
        return self.matrix.numbers.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.matrix.tensors if self.bias is None else (*self.matrix.tensors, self.bias)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        # Strips of inputs: each number of the result is one product's, and nothing is summed in the type of the model.
        out, in_ = self.shape
        grad_x = grad.new_empty(*grad.shape[:-1], in_)
        for columns in strips(in_, out, self._strip, GROUP):
            grad_x[..., columns] = grad @ self._columns(columns)
        return grad_x

    def _columns(self, columns: slice) -> torch.Tensor:
        """W [out, columns]."""
        raise NotImplementedError

    @property
    def _strip(self) -> int:
        return STRIP.get(self.device.type, STRIP_ELSEWHERE)


@dataclass(frozen=True, eq=False)
class QuantisedWeight(_Strips):
    """W [out, in] as numbers and scales. bias: [out] or None; dtype: of what goes in and comes out.

    kernels: multiply few rows, and make strips dense; None: torch.
    """

    matrix: Matrix
    bias: torch.Tensor | None
    dtype: torch.dtype
    kernels: QuantisedKernels | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels, matrix = self.kernels, self.matrix
        if kernels is not None and not isinstance(matrix, Nf4Matrix) and kernels.takes(x, matrix):
            return kernels.product(x, matrix, self.bias)
        out, in_ = self.shape
        y = x.new_empty(*x.shape[:-1], out)
        for rows in strips(out, in_, self._strip):
            bias = None if self.bias is None else self.bias[rows]
            y[..., rows] = linear(x, self._dense(rows=rows), bias)
        return y

    def _columns(self, columns: slice) -> torch.Tensor:
        return self._dense(columns=columns)

    def _dense(self, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        kernels, matrix = self.kernels, self.matrix
        if kernels is not None and not isinstance(matrix, Nf4Matrix):
            return kernels.dense(matrix, self.dtype, rows, columns)
        return matrix.dense(self.dtype, rows, columns)


@dataclass(frozen=True, eq=False)
class PackedQuantisedWeight(_Strips):
    """The same in bfloat16, in the layout of the C++ kernels, and nowhere else."""

    matrix: QuantisedPanels
    bias: torch.Tensor | None
    dtype: torch.dtype = torch.bfloat16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.matrix, self.bias)

    def _columns(self, columns: slice) -> torch.Tensor:
        return self.matrix.widened(columns)
