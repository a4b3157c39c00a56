"""The frozen weight of a linear layer. What computes with it does not know how it is stored.

A further way to store it, such as a quantised one, is one more class here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from clif.kernels.cpu.arena import Arena
from clif.kernels.cpu.products import PackedMatrix, packed_size, product
from clif.kernels.cpu.quantised_panels import QuantisedPanels, panels_size
from clif.kernels.quantised import QuantisedMatrix
from clif.models.backends import Linear, prepacked_linear
from clif.models.quantised_weight import PackedQuantisedWeight, QuantisedWeight


class BaseWeight(Protocol):
    """A frozen weight W [out, in] and bias b [out]: no gradient of either is ever wanted."""

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of what goes in and comes out."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its plain tensors, the weight first: a graph may refer to them without holding more memory."""
        ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> x W^T + b [rows, out], in fresh memory."""
        ...

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of the output [rows, out] -> that of the input, grad W [rows, in], in fresh memory."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """Plain numbers. weight: [out, in]; bias: [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        return grad @ self.weight


@dataclass(frozen=True, eq=False)
class _WithCopy:
    """A dense weight with a second copy, which its forward uses."""

    dense: Dense

    @property
    def shape(self) -> torch.Size:
        return self.dense.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.dense.dtype

    @property
    def device(self) -> torch.device:
        return self.dense.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.dense.tensors

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        return self.dense.backward(grad)


@dataclass(frozen=True, eq=False)
class Prepacked(_WithCopy):
    """A dense weight with a second copy in the layout of torch's matrix kernels."""

    product: Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


@dataclass(frozen=True, eq=False)
class PackedWeight(_WithCopy):
    """A dense bfloat16 weight with a second copy in the layout of the C++ kernels."""

    matrix: PackedMatrix

    @property
    def bias(self) -> torch.Tensor | None:
        return self.dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.matrix, self.bias)


Compiled = PackedWeight | PackedQuantisedWeight
"""Weights that the C++ kernels multiply with, adapters in the same sums."""


def arena_for(bases: Iterable[BaseWeight]) -> Arena:
    """Memory in huge pages for these weights as the C++ kernels read them."""
    return Arena(sum(map(_packed_size, bases)))


def packed(base: BaseWeight, arena: Arena) -> BaseWeight:
    """The same weight as the C++ kernels read it, in bfloat16, dense or as whole numbers; any other as it is."""
    if _packed_size(base) == 0:
        return base
    if isinstance(base, QuantisedWeight):
        assert isinstance(base.matrix, QuantisedMatrix)
        return PackedQuantisedWeight(QuantisedPanels.of(base.matrix, arena), base.bias)
    assert isinstance(base, Dense)
    return PackedWeight(base, PackedMatrix.of(base.weight, arena))


def _packed_size(base: BaseWeight) -> int:
    """Numbers of an arena that a weight takes; 0 where it is not packed."""
    if base.dtype != torch.bfloat16:
        return 0
    if isinstance(base, QuantisedWeight):
        return panels_size(base.matrix) if isinstance(base.matrix, QuantisedMatrix) else 0
    return Arena.rounded(packed_size(*base.shape)) if isinstance(base, Dense) else 0


def prepacked(base: BaseWeight) -> BaseWeight:
    """The same weight, prepacked where it is dense and the machine gains from that; otherwise as it is."""
    if not isinstance(base, Dense):
        return base
    product = prepacked_linear(base.weight, base.bias)
    return base if product is None else Prepacked(base, product)


def merged(linears: Sequence[nn.Linear]) -> Dense:
    """The weights (and biases) of layers that read the same input, one below the other.

    The layers become views of the merged weight, so that no number is held twice.
    """
    bias = None
    if any(one.bias is not None for one in linears):
        filled = [one.weight.new_zeros(one.out_features) if one.bias is None else one.bias.data for one in linears]
        bias = torch.cat(filled)
    if len(linears) == 1:
        return Dense(linears[0].weight.data, bias)
    weight = torch.cat([one.weight.data for one in linears])
    for one, part in zip(linears, weight.split([one.out_features for one in linears]), strict=True):
        one.weight.data = part
    return Dense(weight, bias)
