"""What a decoder layer computes between its products: random batches, their results by torch, and error bounds.

The specification is the same for GPU and interpreter. A result is compared with float64: its Frobenius error is at most
1.25 times that of torch's operators in the same type on the same data, and its largest error at most twice theirs. Free
of Triton.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from clif.kernels.elementwise_reference import SwiGLU, rms_norm, rotate, rotate_heads, write_rows

APPROXIMATE = 2.0**-21
"""Relative error of the hardware's 2^x, 1/x and 1/sqrt(x), each right to two units in the last place (CUDA C++
Programming Guide, intrinsic functions), one behind the other. It shows in float32 alone."""
FEW = 512
"""Below this many numbers it is chance which error is larger."""

Results = Mapping[str, torch.Tensor]


class Batch(Protocol):
    """A part of a layer with its input. by_torch: results and gradients, by name, in a type."""

    def by_torch(self, dtype: torch.dtype) -> Results: ...


@dataclass(frozen=True, eq=False)
class NormBatch:
    """Sum and norm of rows. hidden, added, grad_normed, grad_summed: [rows, n]; weight [n]. None: there is none."""

    hidden: torch.Tensor
    added: torch.Tensor | None
    weight: torch.Tensor
    eps: float
    grad_normed: torch.Tensor
    grad_summed: torch.Tensor | None

    def by_torch(self, dtype: torch.dtype) -> Results:
        """summed, normed, and grad: that of both addends."""
        hidden = self.hidden.to(dtype, copy=True).requires_grad_()
        summed = hidden if self.added is None else hidden + self.added.to(dtype)
        normed = rms_norm(summed, self.weight.to(dtype), self.eps)
        outputs, grads = [normed], [self.grad_normed.to(dtype)]
        if self.grad_summed is not None:
            outputs, grads = [*outputs, summed.clone()], [*grads, self.grad_summed.to(dtype)]
        (grad,) = torch.autograd.grad(outputs, [hidden], grads)
        return {"summed": summed.detach(), "normed": normed.detach(), "grad": grad}


@dataclass(frozen=True, eq=False)
class HeadsBatch:
    """Heads of a merged projection. qkv [rows, (heads + 2 kv_heads) * d]; cos, sin [rows, d]; cache [2 * kv_heads,
    slots, d], with NaN wherever nothing is written; slots [rows]; weights [d] of the norms of query and key, or None;
    grads of query, key and value."""

    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    heads: int
    kv_heads: int
    cache: torch.Tensor
    slots: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor] | None
    eps: float
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def by_torch(self, dtype: torch.dtype) -> Results:
        """query, key, value, written [2 * kv_heads, rows, d], what lies in the rows' slots, and grad of qkv."""
        qkv = self.qkv.to(dtype, copy=True).requires_grad_()
        cos, sin = (t.to(dtype).unsqueeze(1) for t in (self.cos, self.sin))
        norms = None
        if self.weights is not None:
            q_weight, k_weight = (w.to(dtype) for w in self.weights)
            norms = (lambda x: rms_norm(x, q_weight, self.eps)), (lambda x: rms_norm(x, k_weight, self.eps))
        made = rotate_heads(qkv, self.heads, self.kv_heads, lambda x: rotate(x, cos, sin), norms)
        (grad,) = torch.autograd.grad(made, [qkv], [g.to(dtype) for g in self.grads])
        query, key, value = (t.detach() for t in made)
        cache = self.cache.to(dtype, copy=True)
        write_rows(cache, self.slots, key, value)
        return {"query": query, "key": key, "value": value, "written": cache[:, self.slots.long()], "grad": grad}


@dataclass(frozen=True, eq=False)
class GateBatch:
    """wide [rows, gate | up], and the gradient of the result [rows, n]."""

    wide: torch.Tensor
    grad_narrow: torch.Tensor

    def by_torch(self, dtype: torch.dtype) -> Results:
        """narrow, and grad of wide."""
        wide = self.wide.to(dtype, copy=True).requires_grad_()
        narrow: torch.Tensor = SwiGLU.apply(wide)
        (grad,) = torch.autograd.grad(narrow, [wide], self.grad_narrow.to(dtype))
        return {"narrow": narrow.detach(), "grad": grad}


@dataclass(frozen=True)
class Draw:
    """Source of random tensors, equal on every device. pad: numbers between the rows of each."""

    dtype: torch.dtype
    device: str = "cpu"
    pad: int = 0
    seed: int = 0

    def tensors(self, *shapes: tuple[int, ...], scale: float = 1.0) -> Iterable[torch.Tensor]:
        """Rows of different sizes, padded by NaN."""
        rng = torch.Generator().manual_seed(self.seed)
        for shape in shapes:
            values = (
                scale
                * torch.randn(shape, generator=rng)
                * (0.1 + 2 * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=rng))
            )
            padded = torch.nn.functional.pad(values, (0, self.pad), value=torch.nan).to(self.device, self.dtype)
            yield padded[..., : shape[-1]]


def random_norm(rows: int, width: int, draw: Draw, *, adds: bool = True, learns: bool = True) -> NormBatch:
    """adds: with the sum before the norm; learns: with a gradient of the sum's other readers."""
    hidden, added, grad_normed, grad_summed = draw.tensors(*[(rows, width)] * 4)
    weight = 1 + 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(draw.seed))
    return NormBatch(
        hidden, added if adds else None, weight.to(draw.device, draw.dtype), 1e-5, grad_normed,
        grad_summed if learns else None,
    )  # fmt: skip


def random_heads(
    rows: int, heads: int, kv_heads: int, d: int, draw: Draw, *, norms: bool = False, slots: torch.dtype = torch.int64
) -> HeadsBatch:
    """Rows at positions all over a context, whose slots lie anywhere in a cache of twice as many."""
    rng = torch.Generator().manual_seed(draw.seed)
    (qkv,) = draw.tensors((rows, (heads + 2 * kv_heads) * d))
    grads = tuple(draw.tensors((rows, heads, d), (rows, kv_heads, d), (rows, kv_heads, d)))
    angles = torch.randint(5000, (rows, 1), generator=rng) * 1e4 ** -(torch.arange(0, d, 2) / d)
    cos, sin = angles.cos().repeat(1, 2), angles.sin()
    weights = 1 + 0.3 * torch.randn(2, d, generator=rng)
    cos, sin, weights = (t.to(draw.device, draw.dtype) for t in (cos, torch.cat((-sin, sin), 1), weights))
    cache = torch.full((2 * kv_heads, 2 * rows + 3, d), torch.nan, device=draw.device, dtype=draw.dtype)
    chosen = torch.randperm(2 * rows + 3, generator=rng)[:rows].to(draw.device, slots)
    made = (weights[0], weights[1]) if norms else None
    return HeadsBatch(qkv, cos, sin, heads, kv_heads, cache, chosen, made, 1e-6, (grads[0], grads[1], grads[2]))


def random_gate(rows: int, width: int, draw: Draw) -> GateBatch:
    wide, grad_narrow = draw.tensors((rows, 2 * width), (rows, width))
    return GateBatch(wide, grad_narrow)


def violations(batch: Batch, found: Results, dtype: torch.dtype) -> list[str]:
    """Violations of the specification, in words; empty if there are none."""
    exact, torchs = batch.by_torch(torch.float64), batch.by_torch(dtype)
    assert found.keys() == exact.keys()
    return [f"{name}: {wrong}" for name in found for wrong in _violations(exact[name], torchs[name], found[name])]


def _violations(exact: torch.Tensor, torchs: torch.Tensor, found: torch.Tensor) -> list[str]:
    if found.shape != exact.shape or found.dtype != torchs.dtype:
        return [f"{list(found.shape)} of {found.dtype}, not {list(exact.shape)} of {torchs.dtype}"]
    if not exact.numel():
        return []
    if not found.isfinite().all():
        return ["not finite"]
    wrong, unit = [], torch.finfo(found.dtype).eps
    off, allowed = ((x.double() - exact).abs() for x in (found, torchs))
    error, torch_error = float(off.norm() / exact.norm()), float(allowed.norm() / exact.norm())
    # Where torch happens to be exact, a rounding of the last bit is no fault. Independent errors add by their squares.
    if exact.numel() >= FEW and error > math.hypot(1.25 * torch_error + unit / 8, APPROXIMATE):
        wrong.append(f"relative error {error:.2e}, torch's is {torch_error:.2e}")
    excess = float(off.max() / (2 * allowed.max() + (unit + APPROXIMATE) * exact.abs().max()))
    if excess > 1:
        wrong.append(f"a number is off by {excess:.1f} times what roundings allow")
    return wrong


def computed(batch: Batch) -> Results:
    """What the kernels compute of a batch, by the names of by_torch."""
    # Late: the specification itself is free of Triton.
    from clif.kernels import elementwise_host as host

    if isinstance(batch, NormBatch):
        summed, normed = host.launch_add_rms_norm(batch.hidden, batch.added, batch.weight, batch.eps)
        grad = host.launch_rms_norm_grad(summed, batch.weight, batch.eps, batch.grad_normed, batch.grad_summed)
        return {"summed": summed, "normed": normed, "grad": grad}
    if isinstance(batch, HeadsBatch):
        eps, weights, cache = batch.eps, batch.weights, batch.cache.clone()
        norms = None if weights is None else host.HeadNorms(weights[0], eps, weights[1], eps)
        query, key, value = host.launch_rotate_heads(
            batch.qkv, batch.cos, batch.sin, batch.heads, batch.kv_heads, norms, cache, batch.slots
        )
        grad = host.launch_rotate_heads_grad(batch.grads, batch.cos, batch.sin, norms, batch.qkv)
        written = cache[:, batch.slots.long()]
        return {"query": query, "key": key, "value": value, "written": written, "grad": grad}
    assert isinstance(batch, GateBatch)
    narrow, grad = host.launch_swiglu(batch.wide), host.launch_swiglu_grad(batch.wide, batch.grad_narrow)
    return {"narrow": narrow, "grad": grad}
