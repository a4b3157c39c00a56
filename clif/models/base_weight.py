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
from clif.kernels.quantised import QuantisedMatrix, joined
from clif.models.backends import Linear, prepacked_linear
from clif.models.packed_linear import PackedLinear
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


@dataclass(frozen=True, eq=False)
class Stacked:
    """Weights that are stored in several ways, one below the other."""

    parts: tuple[BaseWeight, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.forward(x) for part in self.parts], -1)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        grads = grad.split([part.shape[0] for part in self.parts], -1)
        found = torch.stack([part.backward(of) for part, of in zip(self.parts, grads, strict=True)])
        # The sum is rounded once.
        return found.sum(0, dtype=torch.float32).to(grad.dtype)


@dataclass(frozen=True, eq=False)
class Permuted:
    """A weight whose columns stand in another order than the inputs. order [in]: the input of each column."""

    inner: BaseWeight
    order: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.inner.tensors, self.order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.forward(x.index_select(-1, self.order))

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        found = self.inner.backward(grad)
        return torch.empty_like(found).index_copy_(-1, self.order, found)


Compiled = PackedWeight | PackedQuantisedWeight
"""Weights that the C++ kernels multiply with, adapters in the same sums."""


def arena_for(bases: Iterable[BaseWeight]) -> Arena:
    """Memory in huge pages for these weights as the C++ kernels read them."""
    return Arena(sum(map(_packed_size, bases)))


def packed(base: BaseWeight, arena: Arena) -> BaseWeight:
    """The same weight as the C++ kernels read it, in bfloat16, dense or as whole numbers; any other as it is."""
    if _packed_size(base) == 0:
        return base
    if isinstance(base, Stacked):
        return Stacked(tuple(packed(part, arena) for part in base.parts))
    if isinstance(base, Permuted):
        return Permuted(packed(base.inner, arena), base.order)
    if isinstance(base, QuantisedWeight):
        assert isinstance(base.matrix, QuantisedMatrix)
        return PackedQuantisedWeight(QuantisedPanels.of(base.matrix, arena), base.bias)
    assert isinstance(base, Dense)
    return PackedWeight(base, PackedMatrix.of(base.weight, arena))


def _packed_size(base: BaseWeight) -> int:
    """Numbers of an arena that a weight takes; 0 where it is not packed."""
    if base.dtype != torch.bfloat16:
        return 0
    if isinstance(base, Stacked):
        return sum(map(_packed_size, base.parts))
    if isinstance(base, Permuted):
        return _packed_size(base.inner)
    if isinstance(base, QuantisedWeight):
        return panels_size(base.matrix) if isinstance(base.matrix, QuantisedMatrix) else 0
    return Arena.rounded(packed_size(*base.shape)) if isinstance(base, Dense) else 0


def prepacked(base: BaseWeight) -> BaseWeight:
    """The same weight, prepacked where it is dense and the machine gains from that; otherwise as it is."""
    if not isinstance(base, Dense):
        return base
    product = prepacked_linear(base.weight, base.bias)
    return base if product is None else Prepacked(base, product)


def merged(linears: Sequence[nn.Linear]) -> BaseWeight:
    """The weights (and biases) of layers that read the same input, one below the other.

    The layers become views of the merged weight, so that no number is held twice.
    """
    if any(isinstance(one, PackedLinear) for one in linears):
        return _merged_packed(linears)
    bias = None
    if any(one.bias is not None for one in linears):
        bias = torch.cat([_bias_of(one) for one in linears])
    if len(linears) == 1:
        return Dense(linears[0].weight.data, bias)
    weight = torch.cat([one.weight.data for one in linears])
    for one, part in zip(linears, weight.split([one.out_features for one in linears]), strict=True):
        one.weight.data = part
    return Dense(weight, bias)


def _bias_of(one: nn.Linear) -> torch.Tensor:
    return one.weight.new_zeros(one.out_features) if one.bias is None else one.bias.data


def _merged_packed(linears: Sequence[nn.Linear]) -> BaseWeight:
    """The same where some are packed: one matrix where all are of one form and have their inputs in one order."""
    together = _joined([one for one in linears if isinstance(one, PackedLinear)])
    if together is None or not all(isinstance(one, PackedLinear) for one in linears):
        return Stacked(tuple(map(_by_itself, linears)))
    bias = torch.cat([_bias_of(one) for one in linears]) if any(one.bias is not None for one in linears) else None
    return _in_order(QuantisedWeight(together[0], bias, linears[0].weight.dtype), together[1])


def _joined(linears: Sequence[PackedLinear]) -> tuple[QuantisedMatrix, torch.Tensor | None] | None:
    order = linears[0].order
    if not all(one.order is order or _equal(one.order, order) for one in linears):
        return None
    matrix = joined([one.matrix for one in linears])
    if matrix is None:
        return None
    start = 0
    for one in linears:
        one.matrix = matrix.select(slice(start, start + one.out_features))
        start += one.out_features
    return matrix, order


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _by_itself(one: nn.Linear) -> BaseWeight:
    bias = None if one.bias is None else one.bias.data
    if not isinstance(one, PackedLinear):
        return Dense(one.weight.data, bias)
    return _in_order(QuantisedWeight(one.matrix, bias, one.weight.dtype), one.order)


def _in_order(weight: QuantisedWeight, order: torch.Tensor | None) -> BaseWeight:
    return weight if order is None else Permuted(weight, order)
