"""One matrix of every expert, multiplied with rows that are grouped by expert.

Sources: MegaBlocks (Gale et al. 2023) for one product of all groups.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from clif.kernels.fp8_matrix import Fp8Matrix
from clif.kernels.quantised import GROUP, QuantisedMatrix, strips
from clif.models.base_backward import base_backward
from clif.models.base_weight import BaseWeight, Dense

if TYPE_CHECKING:
    from clif.kernels.cpu.training import TrainingKernels
    from clif.kernels.quantised_host import QuantisedKernels

log = logging.getLogger(__name__)
ALIGNED = 16
"""Bytes that rows of grouped products are multiples of."""
STRIP = 1 << 25
"""Numbers of experts in 8 or 4 bits that are dense at a time."""
NEAR = 0.02
"""Relative difference that two orders of sums account for in bfloat16."""


class Groups:
    """(row, choice) pairs of a batch, grouped by expert.

    experts, order, rows [pairs]: the expert of each, where it lies among the flattened choices, and its row.
    """

    def __init__(self, experts: torch.Tensor, count: int) -> None:
        """experts [rows, k]: numbers below `count`."""
        self.k, self.count = experts.shape[1], count
        self.experts, self.order = experts.flatten().sort(stable=True)
        self.rows = self.order // self.k

    @cached_property
    def ends(self) -> torch.Tensor:
        """Where the pairs of each expert end, [count] int32."""
        numbers = torch.arange(self.count, device=self.experts.device)
        return torch.searchsorted(self.experts, numbers, right=True).int()

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, start, stop) of those that have pairs. Waits for the device."""
        ends = self.ends.tolist()
        return [(n, start, stop) for n, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)) if stop > start]

    def spread(self, pairs: torch.Tensor) -> torch.Tensor:
        """[pairs, n] by expert -> [rows, k, n]."""
        return torch.empty_like(pairs).index_copy_(0, self.order, pairs).view(-1, self.k, pairs.shape[1])


@dataclass
class FrozenLinear:
    """The matrix of one expert."""

    base: BaseWeight


@dataclass(frozen=True, eq=False)
class StoredExperts:
    """The matrices of all experts in 8 or 4 bits, one below the other, as the Triton kernels read them."""

    matrix: QuantisedMatrix | Fp8Matrix
    count: int
    kernels: QuantisedKernels

    def forward(self, groups: Groups, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.grouped(x, self.matrix, groups.ends)

    def backward(self, groups: Groups, grad: torch.Tensor) -> torch.Tensor:
        # Strips of inputs, as of one matrix: each number of the result is one product's.
        of_input = grad.new_empty(len(grad), self.matrix.in_)
        for columns in strips(self.matrix.in_, self.matrix.out, STRIP, GROUP):
            dense = self.kernels.dense(self.matrix, grad.dtype, columns=columns).unflatten(0, (self.count, -1))
            of_input[:, columns] = torch.nn.functional.grouped_mm(grad, dense, offs=groups.ends)
        return of_input


class ExpertLinears:
    """y = x W_e^T + b_e, with e the expert of a pair. weights [count, out, in], views; biases [count, out] or None.

    training: what computes products with gradients, in bfloat16 on a CPU; None: torch. grouped: all experts are one
    product, which waits for nothing: of torch's, or of the kernels for those that are `stored` in 8 or 4 bits.
    """

    def __init__(self, weights: torch.Tensor, biases: torch.Tensor | None) -> None:
        self.each = [FrozenLinear(Dense(one, None)) for one in weights]
        self.weights, self.biases = weights, biases
        self.training: TrainingKernels | None = None
        self.stored: StoredExperts | None = None
        self.grouped = False

    def forward(self, groups: Groups, x: torch.Tensor) -> torch.Tensor:
        """x [pairs, in] -> [pairs, out]."""
        if self.grouped and self.stored is not None:
            y = self.stored.forward(groups, x)
        elif self.grouped:
            y = torch.nn.functional.grouped_mm(x, self.weights.transpose(1, 2), offs=groups.ends)
        else:
            y = torch.cat([base.forward(part) for base, part in self._parts(groups, x)])
        return y if self.biases is None else y.add_(self.biases.index_select(0, groups.experts))

    def backward(self, groups: Groups, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of y [pairs, out] -> that of x [pairs, in]."""
        if self.grouped and self.stored is not None:
            return self.stored.backward(groups, grad)
        if self.grouped:
            return torch.nn.functional.grouped_mm(grad, self.weights, offs=groups.ends)
        return torch.cat([base_backward(base, part, self.training) for base, part in self._parts(groups, grad)])

    def of_biases(self, groups: Groups, grad: torch.Tensor) -> torch.Tensor | None:
        """What the biases add to the product of y and its gradient, [pairs]."""
        return None if self.biases is None else (grad * self.biases.index_select(0, groups.experts)).sum(1)

    def _parts(self, groups: Groups, x: torch.Tensor) -> Iterator[tuple[BaseWeight, torch.Tensor]]:
        return ((self.each[expert].base, x[start:stop]) for expert, start, stop in groups.spans)

    @property
    def can_group(self) -> bool:
        """Whether grouped products take these weights."""
        if self.stored is not None:
            matrix = self.stored.matrix
            return matrix.in_ % GROUP == 0 and matrix.out // self.stored.count % ALIGNED == 0
        if not all(isinstance(one.base, Dense) for one in self.each):
            return False
        return not any(size * self.weights.itemsize % ALIGNED for size in self.weights.shape[1:])


def choose_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all experts of a layer are one grouped product of torch's: on a GPU, where it computes what one product
    for each expert does. Waits for the device, once.

    Only so can steps of a model with experts be captured: the sizes of groups are data.
    """
    if device.type != "cuda":
        return False
    obstacle = None if dtype == torch.bfloat16 else f"torch groups none of {dtype}"
    obstacle = obstacle or grouped_fault(device, dtype)
    log.info("experts: %s", f"a product for each, {obstacle}" if obstacle else "torch's grouped products")
    return obstacle is None


@torch.no_grad()
def grouped_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with torch's grouped products on this device; None: nothing. Waits for the device.

    Tried are experts without rows, and both layouts of the weights.
    """
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped products"
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 48, 32, generator=rng).to(device, dtype)
    x, grad = (torch.randn(23, n, generator=rng).to(device, dtype) for n in (32, 48))
    groups = Groups(torch.tensor([[3]] * 9 + [[0]] * 13 + [[4]], device=device), 5)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for layout in (weights, weights.transpose(1, 2).contiguous().transpose(1, 2)):
            for linears in (ExpertLinears(layout, None), ExpertLinears(layout, None)):
                linears.grouped = len(results) % 2 == 1
                results.append((linears.forward(groups, x), linears.backward(groups, grad)))
    except (RuntimeError, ValueError) as error:
        return f"torch's grouped products fail: {str(error).splitlines()[0]}"
    for wanted, got in (results[:2], results[2:]):
        for a, b in zip(wanted, got, strict=True):
            if not (a.float() - b.float()).norm() <= NEAR * a.float().norm():
                return "torch's grouped products are wrong here"
    return None
