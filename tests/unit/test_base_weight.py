"""A linear layer computes by whatever weight it has: dense, prepacked, or one that nothing but its class knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from clif.adapters.bank import AdapterBank
from clif.config import AdapterConfig
from clif.kernels.dual_lora_reference import SHADOW, Segment
from clif.kernels.quantised import Bits, QuantisedMatrix
from clif.models import base_weight
from clif.models.base_weight import BaseWeight, Dense, Prepacked, merged, prepacked
from clif.models.dual_linear import DualLinear, LoraRows
from clif.models.quantised_weight import QuantisedWeight


@dataclass(frozen=True, eq=False)
class EightBit:
    """A stand-in for a quantised weight: whole numbers and a scale for each output."""

    numbers: torch.Tensor
    scale: torch.Tensor

    shape = property(lambda self: self.numbers.shape)
    dtype = property(lambda self: self.scale.dtype)
    device = property(lambda self: self.scale.device)
    tensors = property(lambda self: (self.numbers, self.scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.numbers.to(x.dtype)) * self.scale

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        return (grad * self.scale) @ self.numbers.to(grad.dtype)


def quantised() -> tuple[EightBit, Dense]:
    rng = torch.Generator().manual_seed(1)
    numbers = torch.randint(-127, 128, (40, 24), generator=rng, dtype=torch.int8)
    scale = torch.rand(40, generator=rng) * 0.01
    return EightBit(numbers, scale), Dense(numbers.float() * scale[:, None], None)


def layer_with(base: BaseWeight) -> DualLinear:
    """Two merged modules of 16 and 24 outputs, one of which is adapted."""
    layer = DualLinear(["first", "second"], [torch.nn.Linear(24, 16), torch.nn.Linear(24, 24)])
    layer.base = base
    torch.manual_seed(0)
    lora = layer.adapt([1], r=4, scale=0.5, slots=2)
    bank = AdapterBank([lora], AdapterConfig(r=4))
    lora.shadow_b.data.normal_()
    bank.refresh()
    lora.fill_slot(0, {"second": (torch.randn(4, 24), torch.randn(24, 4))})
    return layer


def served_and_learnt(layer: DualLinear) -> list[torch.Tensor]:
    """Outputs of rows of both kinds, and gradients of the input and of the shadow's factors."""
    rng = torch.Generator().manual_seed(2)
    served, learnt = torch.randn(5, 24, generator=rng), torch.randn(6, 24, generator=rng).requires_grad_()
    rows = [LoraRows(5, (Segment(1, 4, 0),)), LoraRows(6, (Segment(0, 6, SHADOW),), learns=True)]
    first, second = layer([served, learnt], rows)
    second.backward(torch.ones_like(second))
    assert layer.lora is not None
    gradients = [learnt.grad, layer.lora.shadow_a.grad, layer.lora.shadow_b.grad]
    return [first, second, *(g for g in gradients if g is not None)]


def library_weight(bits: Bits) -> tuple[BaseWeight, Dense]:
    matrix = QuantisedMatrix.of(quantised()[1].weight, bits)
    bias = torch.linspace(-1, 1, 40)
    return QuantisedWeight(matrix, bias, torch.float32), Dense(matrix.dense(torch.float32), bias)


@pytest.mark.parametrize("pair", [quantised, partial(library_weight, 8), partial(library_weight, 4)])
def test_a_layer_serves_and_learns_by_a_weight_that_it_knows_nothing_of(pair: Callable[[], tuple[BaseWeight, Dense]]):
    eight_bit, dense = pair()
    expected, found = (served_and_learnt(layer_with(base)) for base in (dense, eight_bit))
    assert len(expected) == len(found) == 5
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_the_kernels_compute_adapters_beside_a_weight_that_they_know_nothing_of():
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from clif.kernels.dual_lora_host import KernelLauncher
    from clif.kernels.tuning import Fixed

    launcher, eight_bit = KernelLauncher(torch.device("cpu"), Fixed()), quantised()[0]
    merged = []
    for base in quantised():
        layer = layer_with(base)
        layer.use_kernels(launcher)
        assert layer._kernels is not None
        merged.append(layer._kernels.merged)
    assert merged[0].base is not None and merged[1].base is None
    assert merged[0].weight.isnan().all() and merged[0].weight.shape == eight_bit.shape, "nothing reads it as a weight"


def test_a_prepacked_weight_serves_by_its_product_and_goes_back_by_the_dense_one(monkeypatch: pytest.MonkeyPatch):
    _, dense = quantised()
    monkeypatch.setattr(base_weight, "prepacked_linear", lambda weight, bias: lambda x: 2 * linear(x, weight, bias))
    twice = prepacked(dense)
    assert isinstance(twice, Prepacked) and prepacked(twice) is twice
    x, grad = torch.randn(3, 24), torch.randn(3, 40)
    assert torch.equal(twice.forward(x), 2 * dense.forward(x)) and torch.equal(
        twice.backward(grad), dense.backward(grad)
    )
    assert (twice.shape, twice.dtype, twice.tensors) == (dense.shape, dense.dtype, dense.tensors)


def test_merged_layers_become_views_of_the_merged_weight_and_lacking_biases_are_zero():
    layers = [torch.nn.Linear(6, 4), torch.nn.Linear(6, 2, bias=False)]
    whole = torch.cat([one.weight.data for one in layers])
    base = merged(layers)
    assert torch.equal(base.weight, whole) and base.bias is not None and base.bias[4:].tolist() == [0.0, 0.0]
    assert {one.weight.untyped_storage().data_ptr() for one in layers} == {base.weight.untyped_storage().data_ptr()}
