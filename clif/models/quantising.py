"""Puts weights of 8 or 4 bits in the place of a stack's dense ones, and says what that costs and saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from clif.config import ConfigError
from clif.kernels.fp8_matrix import Fp8Matrix
from clif.kernels.quantised import QuantisedMatrix
from clif.models.backends import triton_obstacle
from clif.models.base_weight import BaseWeight, Dense, Permuted, Stacked
from clif.models.dual_linear import DualLinear
from clif.models.expert_linears import ExpertLinears, FrozenLinear, StoredExperts
from clif.models.expert_spec import Experts
from clif.models.experts import RoutedMlp
from clif.models.head import Head
from clif.models.nf4_matrix import Nf4Matrix, assert_library
from clif.models.quantised_weight import Matrix, QuantisedWeight
from clif.models.stack import CausalStack

if TYPE_CHECKING:
    from clif.kernels.quantised_host import QuantisedKernels

log = logging.getLogger(__name__)
PROBE = 32
"""Rows of normally distributed numbers that a layer's outputs are compared for."""
NEAR = 0.02
"""Relative difference that roundings of a product to bfloat16 account for."""
FORMATS: dict[str, Callable[[torch.Tensor], Matrix]] = {
    "int8": partial(QuantisedMatrix.of, bits=8),
    "int4": partial(QuantisedMatrix.of, bits=4),
    "fp8": Fp8Matrix.of,
    "nf4": Nf4Matrix.of,
}
"""Values of model.weight_dtype that quantise, and how."""


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

    kind: of FORMATS; dense, bytes: what linear layers and head took, and take now; worst: the largest relative
    difference of a layer's outputs, of the layer `where`.
    """

    kind: str
    dense: int
    bytes: int
    worst: float
    where: str

    def __str__(self) -> str:
        return (
            f"base weights of linear layers and head: {self.kind}, {self.bytes / 2**20:,.1f} MiB in place of "
            f"{self.dense / 2**20:,.1f}; on a probe a layer's outputs differ by {self.worst:.2%} at most ({self.where})"
        )


def assert_stored(kind: str, device: torch.device) -> None:
    """Raises ConfigError, with what to change, where weights of model.weight_dtype `kind` are not computed with."""
    if kind == "nf4":
        assert_library()
    if kind != "fp8" or device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise ConfigError(
            f"model.weight_dtype fp8 needs compute capability 8.9, this GPU has {major}.{minor}: set "
            "model.weight_dtype=int8"
        )


@torch.no_grad()
def quantise(stack: CausalStack, kind: str, kernels: QuantisedKernels | None = None) -> Quantised:
    """Store linear layers and head, this rank's parts, as one of FORMATS; what was dense is freed layer by layer.

    A head that is the embedding's weight is quantised beside it: the embedding stays as it is. The model that the stack
    was made of cannot compute by itself afterwards, and no second stack can be made of it. kernels: multiply few rows.
    """
    dense = size = 0
    worst, where = -1.0, ""
    for part in _parts(stack):
        for one, matrix in zip(part.held, _matrices(part, kind, kernels), strict=True):
            base = one.base
            assert isinstance(base, Dense), "weights are quantised before they are laid out in any other way"
            one.base = QuantisedWeight(matrix, base.bias, base.dtype, kernels)
            dense, size = dense + base.weight.nbytes, size + sum(t.nbytes for t in matrix.tensors)
            error = difference(one.base, base)
            # A NaN is the worst of all.
            if not error <= worst:
                worst, where = error, part.name
        _free(part)
    return Quantised(kind, dense, size, worst, where)


def _matrices(part: _Part, kind: str, kernels: QuantisedKernels | None) -> Iterator[Matrix]:
    """Those of what is held, one after the other; of experts views of one matrix, where kernels multiply with all."""
    experts, make = part.experts, FORMATS[kind]
    if experts is not None and kernels is not None:
        whole, count = make(experts.weights.flatten(0, 1)), len(experts.weights)
        assert not isinstance(whole, Nf4Matrix), "bitsandbytes widens NF4"
        experts.stored = StoredExperts(whole, count, kernels)
        each = whole.out // count
        yield from (whole.select(slice(e * each, (e + 1) * each)) for e in range(count))
        return
    for one in part.held:
        assert isinstance(one.base, Dense), "weights are quantised before they are laid out in any other way"
        yield make(one.base.weight)


def choose_quantised(kind: str, device: torch.device, dtype: torch.dtype) -> QuantisedKernels | None:
    """The Triton kernels that multiply with weights of 8 and 4 bits; None: torch's products with strips made dense.
    Waits for the device, once. kind: of FORMATS; any other: whole numbers of both sizes, as checkpoints have them."""
    if device.type != "cuda":
        return None
    obstacle = "bitsandbytes widens them" if kind == "nf4" else triton_obstacle(device, dtype)
    for one in (kind,) if kind in FORMATS else ("int8", "int4"):
        obstacle = obstacle or quantised_fault(one, device, dtype)
    log.info("products with %s weights: %s", kind, f"torch's ({obstacle})" if obstacle else "Triton kernels")
    return None if obstacle else _kernels(device)


@torch.no_grad()
def quantised_fault(kind: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels on this device; None: nothing. Waits for the device."""
    from triton.errors import TritonError

    rng = torch.Generator().manual_seed(0)
    matrix = FORMATS[kind](torch.randn(72, 288, generator=rng).to(device, dtype))
    dense, kernels = matrix.dense(dtype), _kernels(device)
    try:
        if not (kernels.dense(matrix, dtype).float() - dense.float()).norm() <= NEAR / 10 * dense.float().norm():
            return "a kernel does not widen as torch does"
        for rows in (5, 50, 200):
            x = torch.randn(rows, 288, generator=rng).to(device, dtype)
            expected = torch.nn.functional.linear(x, dense).float()
            if not (kernels.product(x, matrix, None).float() - expected).norm() <= NEAR * expected.norm():
                return "a kernel multiplies wrong here"
        # x of 200 rows: of three experts, one of which has none.
        ends = torch.tensor([130, 130, 200], dtype=torch.int32, device=device)
        own = dense.unflatten(0, (3, -1))
        expected = torch.cat((x[:130] @ own[0].T, x[130:] @ own[2].T)).float()
        if not (kernels.grouped(x, matrix, ends).float() - expected).norm() <= NEAR * expected.norm():
            return "a kernel multiplies with other experts here"
    except (RuntimeError, ValueError, TritonError) as error:
        return f"a kernel fails: {str(error).splitlines()[0]}"
    return None


def use_kernels(stack: CausalStack, kernels: QuantisedKernels) -> None:
    """Multiply few rows by the kernels, with weights that are as their file has them."""
    for part in stack.weighed():
        part.base = _by_kernels(part.base, kernels)


def _by_kernels(base: BaseWeight, kernels: QuantisedKernels) -> BaseWeight:
    if isinstance(base, QuantisedWeight):
        return replace(base, kernels=kernels)
    if isinstance(base, Permuted):
        return replace(base, inner=_by_kernels(base.inner, kernels))
    return (
        replace(base, parts=tuple(_by_kernels(one, kernels) for one in base.parts))
        if isinstance(base, Stacked)
        else base
    )


def _kernels(device: torch.device) -> QuantisedKernels:
    from clif.kernels.quantised_host import QuantisedKernels

    return QuantisedKernels(device)


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
