"""Puts weights of 8 or 4 bits in the place of a stack's dense ones, and says what that costs and saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clif.kernels.quantised import Bits, QuantisedMatrix
from clif.models.base_weight import BaseWeight, Dense
from clif.models.dual_linear import DualLinear
from clif.models.head import Head
from clif.models.quantised_weight import QuantisedWeight
from clif.models.stack import CausalStack

PROBE = 32
"""Rows of normally distributed numbers that a layer's outputs are compared for."""
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
"""Values of model.weight_dtype that quantise."""
_Part = tuple[DualLinear | Head, tuple[str, ...], list[Any]]
"""What multiplies with a weight, the names of its modules, and those that hold the dense weight beside it."""


@dataclass(frozen=True)
class Quantised:
    """What became of a stack's weights.

    dense, bytes: what linear layers and head took, and take now; worst: the largest relative difference of a layer's
    outputs, of the layer `where`.
    """

    bits: Bits
    dense: int
    bytes: int
    worst: float
    where: str

    def __str__(self) -> str:
        return (
            f"base weights of linear layers and head: int{self.bits}, {self.bytes / 2**20:,.1f} MiB in place of "
            f"{self.dense / 2**20:,.1f}; on a probe a layer's outputs differ by {self.worst:.2%} at most ({self.where})"
        )


@torch.no_grad()
def quantise(stack: CausalStack, bits: Bits) -> Quantised:
    """Quantise the linear layers and the head, this rank's parts of them, and free what was dense, layer by layer.

    A head that is the embedding's weight is quantised beside it: the embedding stays as it is. The model that the stack
    was made of cannot compute by itself afterwards, and no second stack can be made of it.
    """
    dense = size = 0
    worst, where = -1.0, ""
    head: Any = stack.model.get_output_embeddings()
    tied = head.weight is stack.model.get_input_embeddings().weight
    parts: list[_Part] = [(linear, linear.names, _modules(stack, linear.names)) for linear in stack.linears]
    parts.append((stack.head, (stack.spec.head,), [] if tied else [head]))
    for part, names, modules in parts:
        base = part.base
        assert isinstance(base, Dense), "weights are quantised before they are laid out in any other way"
        part.base = QuantisedWeight(QuantisedMatrix.of(base.weight, bits), base.bias, base.dtype)
        dense, size = dense + base.weight.nbytes, size + sum(t.nbytes for t in part.base.tensors[:2])
        error = difference(part.base, base)
        # A NaN is the worst of all.
        if not error <= worst:
            worst, where = error, names[0] if len(names) == 1 else f"{names[0]} and what is merged with it"
        for module in modules:
            module.weight.data = module.weight.data.new_empty(0)
    return Quantised(bits, dense, size, worst, where)


def difference(base: BaseWeight, dense: BaseWeight) -> float:
    """Of the outputs of two weights, for the same normally distributed rows, relative to those of `dense`."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE, base.shape[1], generator=rng).to(base.device, base.dtype)
    expected = dense.forward(x).float()
    return float((base.forward(x).float() - expected).norm() / expected.norm())


def _modules(stack: CausalStack, names: tuple[str, ...]) -> list[Any]:
    return [stack.model.get_submodule(name) for name in names]
