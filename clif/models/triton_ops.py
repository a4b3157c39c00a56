"""The parts of a layer between its products as one Triton launch each, forward and backward.

Rows that learn leave little behind: the norm its sum, the gate its input, the rotation nothing but the angles. Weights
of norms are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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
    is_silu,
)


class TritonOps:
    """Parts that the kernels compute; torch's for modules that are no plain RMSNorm, and other gates than silu's."""

    def __init__(self, max_context: int) -> None:
        """max_context: the positions that there are."""
        self._max_context = max_context

    def angles(self, rotary: Any, like: torch.Tensor) -> Angles:
        return AngleTable(TorchAngles(rotary, like), self._max_context)

    def norm(self, module: Any) -> Norm:
        plain = as_rms_norm(module)
        return TorchNorm(module) if plain is None else TritonNorm(*plain)

    def rotary(self, layout: HeadLayout) -> Rotary:
        if layout.norms is None:
            return TritonRotary(layout, None)
        query, key = (as_rms_norm(module) for module in layout.norms)
        return TorchRotary(layout) if query is None or key is None else TritonRotary(layout, HeadNorms(*query, *key))

    def gate(self, activation: Activation) -> Activation:
        return triton_gate if is_silu(activation) else TorchGate(activation)


@torch.no_grad()
def as_rms_norm(module: Any) -> tuple[torch.Tensor, float] | None:
    """Weight [n] and epsilon of a module that computes rms_norm; None for any other, whatever its name is."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    probe = torch.linspace(-3, 5, 2 * len(weight), device=weight.device).to(weight.dtype).view(2, -1)
    # The second row is so small that epsilon shows.
    probe[1] *= eps**0.5
    found, expected = module(probe), rms_norm(probe, weight, eps)
    near = 4 * torch.finfo(weight.dtype).eps
    same = found.dtype == expected.dtype and torch.allclose(found.float(), expected.float(), rtol=near, atol=near)
    return (weight.detach(), eps) if same else None


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
