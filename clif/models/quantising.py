"""Puts weights of 8 or 4 bits in the place of a stack's dense ones, and says what that costs and saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from clif.kernels.quantised import Bits, QuantisedMatrix
from clif.models.base_weight import BaseWeight, Dense
from clif.models.dual_linear import DualLinear
from clif.models.expert_linears import ExpertLinears, FrozenLinear
from clif.models.expert_spec import Experts
from clif.models.experts import RoutedMlp
from clif.models.head import Head
from clif.models.quantised_weight import QuantisedWeight
from clif.models.stack import CausalStack

PROBE = 32
"""Rows of normally distributed numbers that a layer's outputs are compared for."""
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
"""Values of model.weight_dtype that quantise."""


@dataclass(frozen=True)
class _Part:
    """What multiplies with weights of one kind. parameters: of the model, which hold the dense weights beside it."""

    name: str
    held: list[DualLinear | FrozenLinear | Head]
    parameters: list[torch.nn.Parameter]
    experts: ExpertLinears | None = None


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
    for part in _parts(stack):
        for one in part.held:
            base = one.base
            assert isinstance(base, Dense), "weights are quantised before they are laid out in any other way"
            matrix = QuantisedMatrix.of(base.weight, bits)
            one.base = QuantisedWeight(matrix, base.bias, base.dtype)
            dense, size = dense + base.weight.nbytes, size + sum(t.nbytes for t in matrix.tensors)
            error = difference(one.base, base)
            # A NaN is the worst of all.
            if not error <= worst:
                worst, where = error, part.name
        _free(part)
    return Quantised(bits, dense, size, worst, where)


def _parts(stack: CausalStack) -> Iterator[_Part]:
    """All parts, in the order in which a step reads them."""
    model, mlp = stack.model, stack.spec.layer.mlp
    for i, layer in enumerate(stack.decoder_layers):
        for linear in layer.linears:
            name = linear.names[0] if len(linear.names) == 1 else f"{linear.names[0]} and what is merged with it"
            yield _Part(name, [linear], [model.get_parameter(f"{one}.weight") for one in linear.names])
        if isinstance(layer.mlp, RoutedMlp) and isinstance(mlp, Experts):
            for path, linears in zip((mlp.gate_up, mlp.down), layer.mlp.linears, strict=True):
                name = f"{stack.spec.layers}.{i}.{path}"
                yield _Part(name, [*linears.each], [model.get_parameter(name)], linears)
    head: Any = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    yield _Part(stack.spec.head, [stack.head], [] if tied else [head.weight])


def _free(part: _Part) -> None:
    for parameter in part.parameters:
        parameter.data = parameter.data.new_empty(0)
    if part.experts is not None:
        # Grouped products read all experts as one dense tensor.
        part.experts.weights, part.experts.grouped = part.experts.weights.new_empty(0), False


def difference(base: BaseWeight, dense: BaseWeight) -> float:
    """Of the outputs of two weights, for the same normally distributed rows, relative to those of `dense`."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE, base.shape[1], generator=rng).to(base.device, base.dtype)
    expected = dense.forward(x).float()
    return float((base.forward(x).float() - expected).norm() / expected.norm())
