"""The parts of a layer between its products as one Triton launch each, forward and backward.

Rows that learn leave little behind: the norm its sum, the gate its input, the rotation nothing but the angles. Weights
of norms are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import silu
from triton.errors import TritonError

from clif.kernels.elementwise_host import (
    HeadNorms,
    launch_add_rms_norm,
    launch_rms_norm_grad,
    launch_rotate_heads,
    launch_rotate_heads_grad,
    launch_swiglu,
    launch_swiglu_grad,
)
from clif.kernels.elementwise_reference import rms_norm
from clif.models.layer_ops import (
    Activation,
    Angles,
    AngleTable,
    CacheRows,
    HeadLayout,
    Norm,
    Rope,
    Rotary,
    TorchAngles,
    TorchGate,
    TorchNorm,
    TorchRotary,
    as_rms_norm,
    is_silu,
)

SAME = 0.02
"""Relative difference to torch's operators that is rounding: a bfloat16 has 8 bits."""
SAME_FP8 = 0.06
"""The same of a number that is then rounded to 4 bits."""


class TritonOps:
    """Parts that the kernels compute; torch's for modules that are no plain RMSNorm, and other gates than silu's."""

    training = None

    def __init__(self, max_context: int) -> None:
        """max_context: the positions that there are."""
        self._max_context = max_context

    def angles(self, rotary: Any, like: torch.Tensor) -> Angles:
        return AngleTable(TorchAngles(rotary, like), self._max_context)

    def norm(self, module: Any) -> Norm:
        plain = as_rms_norm(module)
        return TorchNorm(module) if plain is None else TritonNorm(*plain)

    def rotary(self, layout: HeadLayout) -> Rotary:
        if not layout.turns_all:
            return TorchRotary(layout)
        if layout.norms is None:
            return TritonRotary(layout, None)
        query, key = (as_rms_norm(module) for module in layout.norms)
        return TorchRotary(layout) if query is None or key is None else TritonRotary(layout, HeadNorms(*query, *key))

    def gate(self, activation: Activation) -> Activation:
        return triton_gate if is_silu(activation) else TorchGate(activation)


@dataclass(frozen=True, eq=False)
class TritonNorm:
    """RMSNorm of rows, and the residual add before it."""

    weight: torch.Tensor
    eps: float

    def __call__(self, hidden: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if not (hidden.requires_grad or (added is not None and added.requires_grad)):
            return launch_add_rms_norm(hidden, added, self.weight, self.eps)
        summed, normed = _AddRmsNorm.apply(hidden, added, self.weight, self.eps)
        return summed, normed


@dataclass(frozen=True, eq=False)
class TritonRotary:
    """Norms of heads, rotation and write to the cache."""

    layout: HeadLayout
    norms: HeadNorms | None

    def __call__(
        self, qkv: torch.Tensor, rope: Rope, to: CacheRows | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cos, sin = rope.cos.squeeze(1), rope.sin.squeeze(1)
        if not qkv.requires_grad:
            return self.launch(qkv, cos, sin, to)
        query, key, value = _RotateHeads.apply(qkv, cos, sin, to, self)
        return query, key, value

    def launch(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, to: CacheRows | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See launch_rotate_heads."""
        layout, (cache, slots) = self.layout, to or (None, None)
        return launch_rotate_heads(qkv, cos, sin, layout.heads, layout.kv_heads, self.norms, cache, slots)


def triton_gate(wide: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [rows, gate | up]."""
    if not wide.requires_grad:
        return launch_swiglu(wide)
    narrow: torch.Tensor = _SwiGLU.apply(wide)
    return narrow


class _AddRmsNorm(torch.autograd.Function):
    """Two results, since the sum is also read by the residual: its gradient is added in the norm's launch."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summed, normed = launch_add_rms_norm(hidden, added, weight, eps)
        ctx.save_for_backward(summed, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return summed, normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        summed, weight = ctx.saved_tensors
        grad_summed, grad_normed = gradients
        grad = grad_summed
        if grad_normed is not None:
            grad = launch_rms_norm_grad(summed, weight, ctx.eps, grad_normed, grad_summed)
        # Both addends have the same gradient; autograd changes neither in place.
        return grad, grad if ctx.needs_input_grad[1] else None, None, None


class _RotateHeads(torch.autograd.Function):
    """The input is kept for norms only: a rotation's gradient is the rotation back."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, to: CacheRows | None, rotary: TritonRotary
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.rotary = rotary
        ctx.save_for_backward(cos, sin, None if rotary.norms is None else qkv)
        return rotary.launch(qkv, cos, sin, to)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = gradients
        cos, sin, qkv = ctx.saved_tensors
        grad = launch_rotate_heads_grad((query, key, value), cos, sin, ctx.rotary.norms, qkv)
        return grad, None, None, None, None


class _SwiGLU(torch.autograd.Function):
    """The input alone is kept."""

    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(wide)
        return launch_swiglu(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (wide,) = ctx.saved_tensors
        return launch_swiglu_grad(wide, gradients[0])


def kernel_fault(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> str | None:
    """What is wrong with the kernels on this device, forward or backward; None: nothing. Waits for the device.

    kv_dtype: type of the KV cache, by default dtype.
    """
    rng, layout, eps = torch.Generator().manual_seed(0), HeadLayout(4, 2, 16, None), 1e-5
    shapes = (5, 128), (5, 128), (128,), (16,), (16,), (5, 1, 16), (5, 1, 16)
    hidden, added, *weights, cos, sin = (torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes)
    norm, *heads = (partial(rms_norm, weight=weight, eps=eps) for weight in weights)
    kernels: _Parts = (
        TritonNorm(weights[0], eps),
        TritonRotary(layout, HeadNorms(weights[1], eps, weights[2], eps)),
        triton_gate,
    )
    torchs: _Parts = TorchNorm(norm), TorchRotary(replace(layout, norms=(heads[0], heads[1]))), TorchGate(silu)
    try:
        results = [_tried(parts, hidden, added, Rope(cos, sin), kv_dtype or dtype) for parts in (kernels, torchs)]
    except (RuntimeError, ValueError, TritonError) as error:
        return f"a kernel fails: {str(error).splitlines()[0]}"
    apart = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*results, strict=True)]
    names = ("result", "gradient", "cache")
    bounds = (SAME, SAME, SAME if kv_dtype in (None, dtype) else SAME_FP8)
    wrong = [f"{n} by {error:.2g}" for n, error, bound in zip(names, apart, bounds, strict=True) if not error < bound]
    return f"the kernels are wrong here: {', '.join(wrong)}" if wrong else None


_Parts = tuple[Norm, Rotary, Activation]


@torch.enable_grad()
def _tried(
    parts: _Parts, hidden: torch.Tensor, added: torch.Tensor, rope: Rope, kv_dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """A result of all parts, its gradient, and the cache of every second row."""
    norm, rotary, gate = parts
    hidden = hidden.clone().requires_grad_()
    summed, normed = norm(hidden, added)
    query, key, value = rotary(normed, rope, None)
    gated = gate(torch.cat((key, value), 1).flatten(1))
    out = torch.cat((summed, query.flatten(1), gated), 1)
    (grad,) = torch.autograd.grad(out, hidden, torch.ones_like(out))
    cache = hidden.new_zeros(2 * key.shape[1], 2 * len(key), key.shape[2], dtype=kv_dtype)
    rotary(normed.detach(), rope, CacheRows(cache, torch.arange(len(key), device=cache.device) * 2))
    return out.detach(), grad, cache
