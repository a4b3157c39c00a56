"""Specification of the dual LoRA kernels and its error bounds, the same for GPU, interpreter and plain torch.

A result is compared with float64: its Frobenius error is at most 1.25 times that of torch's products in the same type
on the same data, and every element is within the bound of its roundings, or within 1.25 times that by which the worst
one of torch's exceeds it. In float32, where only sums are rounded, torch's error depends on how its library splits a
sum: there the error of a sequential sum is allowed, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn.functional import linear

from clif.kernels.dual_lora_reference import (
    SHADOW,
    MergedLinear,
    Projection,
    Segment,
    add_dual_lora,
    shadow_backward,
    shadow_forward,
)


@dataclass(frozen=True, eq=False)
class Batch:
    """One layer's input: x [rows, in] and, for the rows that learn (the last ones), the gradient of y."""

    merged: MergedLinear
    x: torch.Tensor
    segments: tuple[Segment, ...]
    grad: torch.Tensor

    @property
    def learns(self) -> int:
        """The first row that learns."""
        return len(self.x) - len(self.grad)


@dataclass(frozen=True, eq=False)
class Results:
    """y [rows, out], and of the rows that learn the gradients of x, of A [k r, in] and of B [adapted outputs, r]."""

    y: torch.Tensor
    grad_x: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor


class Layer(Protocol):
    """The layer under test: kernels/dual_lora_forms.DualLoraLinear."""

    def forward(self, x: torch.Tensor, segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor, down: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]: ...


def computed(batch: Batch, layer: Layer) -> Results:
    """Forward of all rows, backward of those that learn."""
    y, hidden = layer.forward(batch.x, batch.segments)
    grad_x, grad_a, grad_b = layer.backward(batch.grad, batch.x[batch.learns :], hidden[batch.learns :], True)
    assert grad_x is not None
    return Results(y, grad_x, grad_a, grad_b)


def random_layer(
    sizes: Sequence[int], depth: int, r: int, *, dtype: torch.dtype, device: str = "cpu", slots: int = 4,
    adapted: Sequence[int] | None = None, scale: float = 0.5, bias: bool = False, seed: int = 0,
) -> MergedLinear:  # fmt: skip
    """A layer of such members (all adapted unless said), whose adapters weigh about as much as the base."""
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    out, adapted = sum(sizes), list(range(len(sizes)) if adapted is None else adapted)
    a = (normal(slots, len(adapted) * r, depth) / r**0.5).to(dtype)
    b = torch.zeros(slots, out, len(adapted) * r, dtype=dtype, device=device)
    projections, at = [], 0
    for i, size in enumerate(sizes):
        block = adapted.index(i) if i in adapted else None
        projections.append(Projection(at, at + size, block))
        if block is not None:
            b[:, at : at + size, block * r : (block + 1) * r] = normal(slots, size, r).to(dtype)
        at += size
    weight = normal(out, depth).to(dtype)
    return MergedLinear(weight, normal(out).to(dtype) if bias else None, a, b, r, scale, tuple(projections))


def random_batch(merged: MergedLinear, lengths: Sequence[tuple[int, int | None]], seed: int = 1) -> Batch:
    """Rows for a layer: (how many, their slot) one after the other; rows of the shadow, if any, come last."""
    rng = torch.Generator(merged.weight.device).manual_seed(seed)
    at, segments = 0, []
    for count, slot in lengths:
        if slot is not None:
            segments.append(Segment(at, at + count, slot))
        at += count
    learns = sum(count for count, slot in lengths if slot == SHADOW)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, device=merged.weight.device).to(merged.weight.dtype)

    out, depth = merged.weight.shape
    return Batch(merged, normal(at, depth), tuple(segments), normal(learns, out))


def by_torch(batch: Batch, dtype: torch.dtype | None = None) -> Results:
    """The reference in the batch's type, or in another."""
    p = batch.merged
    dtype = dtype or p.weight.dtype
    weight, a, b, x, grad = (t.to(dtype) for t in (p.weight, p.a, p.b, batch.x, batch.grad))
    y = linear(x, weight, None if p.bias is None else p.bias.to(dtype))
    serving = [s for s in batch.segments if s.stop <= batch.learns]
    add_dual_lora(y, x, serving, lambda slot: (a[slot], b[slot]), p.scale)
    learnt = x[batch.learns :]
    hidden = shadow_forward(y[batch.learns :], learnt, a[SHADOW], b[SHADOW], p.scale)
    grad_x, grad_a, grad_b = shadow_backward(grad, grad @ weight, learnt, hidden, a[SHADOW], b[SHADOW], p.scale)
    assert grad_x is not None
    return Results(y, grad_x, grad_a, gathered(p, grad_b))


def gathered(merged: MergedLinear, grad_b: torch.Tensor) -> torch.Tensor:
    """The blocks of the gradient of a merged B one below the other."""
    r = merged.r
    adapted = [(m.start, m.stop, m.block) for m in merged.projections if m.block is not None]
    return torch.cat([grad_b[start:stop, block * r : (block + 1) * r] for start, stop, block in adapted])


@dataclass(frozen=True, eq=False)
class Expected:
    """What results of one batch are compared with: float64, torch's products in the batch's type, and bounds."""

    exact: Results
    eager: Results
    bounds: Results

    @classmethod
    def of(cls, batch: Batch) -> Expected:
        return cls(by_torch(batch, torch.float64), by_torch(batch), _bounds(batch))


def violations(batch: Batch, found: Results) -> list[str]:
    """Violations of the specification, in words; empty if there are none."""
    expected = Expected.of(batch)
    names = ("y", "grad_x", "grad_a", "grad_b")
    return [fault for name in names for fault in faults(batch, expected, name, getattr(found, name))]


def faults(batch: Batch, expected: Expected, name: str, found: torch.Tensor) -> list[str]:
    """The same of one result alone."""
    want, got, torchs = (x.double() for x in (getattr(expected.exact, name), found, getattr(expected.eager, name)))
    if not want.numel():
        return []
    if not got.isfinite().all():
        return [f"{name} is not finite"]
    wrong = []
    error, torch_error = (float((x - want).norm() / want.norm()) for x in (got, torchs))
    # Where torch happens to be exact, a rounding of the last bit is no fault.
    allowed = max(1.25 * torch_error + torch.finfo(batch.x.dtype).eps / 8, 1.25 * _in_one_sequence(batch, name))
    if error > allowed:
        wrong.append(f"{name}: relative error {error:.2e}, torch's is {torch_error:.2e}, allowed {allowed:.2e}")
    # cuBLAS may add partial sums of a contraction in the result's type: where they cancel, torch's product is off by
    # more than its roundings.
    excess, torchs_excess = (float(((x - want).abs() / getattr(expected.bounds, name)).max()) for x in (got, torchs))
    if excess > max(1.0, 1.25 * torchs_excess):
        wrong.append(f"{name}: an element is off by {excess:.1f} times what roundings allow")
    return wrong


def _in_one_sequence(batch: Batch, name: str) -> float:
    """Relative error of a float32 sum of n products of random sign that is added up one after the other.

    A rounding has a relative error of 0.42 * 2^-24 (root mean square, mantissas as likely as their logarithms), and the
    k-th meets a partial sum that is sqrt(k / n) of the whole: 0.42 * 2^-24 * sqrt(n / 2) for all of them together.
    Gradients of factors are sums of what is itself such a sum, h or its gradient; independent errors add up as squares.
    Measured on an H100: 3.5e-7 for n = 768, where this is 4.9e-7 and cuBLAS, which cuts the sum, has 2.2e-7.
    """
    out, depth = batch.merged.weight.shape
    n = {"y": depth, "grad_x": out, "grad_a": len(batch.grad) + out, "grad_b": len(batch.grad) + depth}[name]
    return float(0.42 * 2.0**-24 * (n / 2) ** 0.5)


def _bounds(batch: Batch) -> Results:
    """The most by which each element may be off: a rounding of the result, of h, and float32 sums of both products."""
    p, unit = batch.merged, torch.finfo(batch.x.dtype).eps
    magnitudes = Batch(
        MergedLinear(
            p.weight.abs(), None if p.bias is None else p.bias.abs(), p.a.abs(), p.b.abs(), p.r, p.scale, p.projections
        ),
        batch.x.abs(),
        batch.segments,
        batch.grad.abs(),
    )
    exact, sums = by_torch(batch, torch.float64), by_torch(magnitudes, torch.float64)
    base = by_torch(replace(magnitudes, merged=replace(magnitudes.merged, scale=0.0)), torch.float64)
    summing = 4 * max(p.weight.shape[0], p.weight.shape[1], len(batch.x)) ** 0.5 * 2.0**-24

    def bound(name: str) -> torch.Tensor:
        through_h = getattr(sums, name) - getattr(base, name)
        return unit * (getattr(exact, name).abs() + through_h) + summing * getattr(sums, name) + 1e-30

    return Results(*(bound(name) for name in ("y", "grad_x", "grad_a", "grad_b")))
